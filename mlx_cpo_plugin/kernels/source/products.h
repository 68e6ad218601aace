// Products of activations with weights.
#pragma once

#include <algorithm>
#include <optional>

#include "tiles.h"

namespace cpo {

using Sgemm = void (*)(int, int, int, int, int, int, float, const float*, int, const float*, int, float, float*, int);
inline Sgemm sgemm = nullptr;

enum Side { kPlain = 111, kTransposed = 112 };

// C [m, n] = alpha * A B + beta * C, of row-major matrices whose rows lie lda, ldb, ldc apart.
inline void multiply(
    Side a_side, Side b_side, int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda,
    const float* b, int64_t ldb, float beta, float* c, int64_t ldc) {
  constexpr int kRowMajor = 101;
  if (m > 0 && n > 0) {
    sgemm(
        kRowMajor, a_side, b_side, int(m), int(n), int(k), alpha, a, int(lda), b, int(ldb), beta, c, int(ldc));
  }
}

// Numbers of a weight that are widened at a time: they stay in a core's cache while they are multiplied with.
constexpr int64_t kWidened = 1 << 16;
constexpr int64_t kUnit = 16;
// Columns for which it does not matter that their activations are packed for them alone.
constexpr int64_t kPacked = 512;

// Activations [m, depth], in the form in which they are multiplied with a weight.
class Activations {
 public:
  // Threads prepare them together, or the one that makes them does it in scratch memory of its own with that number.
  Activations(const float* data, int64_t m, int64_t depth, const Weight& weight, int scratch_number, bool together)
      : data(data), m(m) {
    if (has_tiles && weight.is(mx::bfloat16) && m >= kFewestRows && m * depth <= kMostNumbers) {
      tiles.emplace(data, m, depth, scratch_number, together);
    }
  }

  // How many columns of a product are best computed together, at least.
  int64_t unit() const {
    return tiles ? kSquare : kUnit;
  }

  // How many are worth being a part by themselves.
  int64_t least() const {
    return tiles ? kColumns : kPacked;
  }

  const float* data;
  int64_t m;
  std::optional<LeftTiles> tiles;
};

// y[:, rows] = x W[rows]^T for rows of the weight; y has rows of ``stride`` numbers and begins with column 0.
inline void times_rows(const Weight& weight, Range rows, const Activations& x, float* y, int64_t stride) {
  if (x.tiles) {
    return x.tiles->multiply(weight, true, 0, rows, false, y, stride);
  }
  int64_t k = weight.columns, m = x.m;
  int64_t step = weight.is_wide() ? rows.size() : std::max<int64_t>(kUnit, kWidened / k);
  for (int64_t begin = rows.begin; begin < rows.end; begin += step) {
    Range block{begin, std::min(begin + step, rows.end)};
    int64_t ld;
    float* buffer = weight.is_wide() ? nullptr : scratch(0, block.size() * k);
    const float* wide = weight.wide(block, {0, k}, buffer, ld);
    multiply(kPlain, kTransposed, m, block.size(), k, 1, x.data, k, wide, ld, 0, y + begin, stride);
  }
}

// dx[:, columns] = dy W[:, columns]
inline void times_columns(const Weight& weight, Range columns, const Activations& dy, float* dx) {
  int64_t n = weight.rows, k = weight.columns, m = dy.m;
  if (dy.tiles) {
    return dy.tiles->multiply(weight, false, 0, columns, false, dx, k);
  }
  int64_t step = weight.is_wide() ? n : std::max<int64_t>(kUnit, kWidened / columns.size());
  for (int64_t begin = 0; begin < n; begin += step) {
    Range block{begin, std::min(begin + step, n)};
    int64_t ld;
    float* buffer = weight.is_wide() ? nullptr : scratch(0, block.size() * columns.size());
    const float* wide = weight.wide(block, columns, buffer, ld);
    multiply(
        kPlain, kPlain, m, columns.size(), block.size(), 1, dy.data + begin, n, wide, ld, begin ? 1 : 0,
        dx + columns.begin, k);
  }
}

}  // namespace cpo
