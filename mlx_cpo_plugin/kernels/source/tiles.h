// Products with bfloat16 weights on the matrix unit of x86 processors that have one (AMX), as exact as in float32: a
// float32 number is the sum of three bfloat16 numbers, and their products with the weights are added up in float32.
// Source of the idea: Henry, Tang and Heinecke 2019, arXiv 1904.06376.
#pragma once

#include <algorithm>
#include <array>

#include "weights.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define CPO_TILES
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace cpo {

// Whether the unit is there and the system lets this process use it.
inline bool has_tiles = false;

constexpr int64_t kSquare = 32;  // rows and columns of a block of sums
// Columns and steps of depth of a right block: with its left rows it stays in a core's cache of the second level.
constexpr int64_t kColumns = 256, kSteps = 32;
// With fewer rows, packing a weight takes longer than multiplying with it as it is; more numbers would fill the memory.
constexpr int64_t kFewestRows = 24, kMostNumbers = 1 << 25;

#ifdef CPO_TILES

inline bool request_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

constexpr int64_t kTile = 16;            // rows of a tile, and columns of a tile of sums
constexpr int64_t kDepth = 32;           // what a tile's rows are multiplied over, in bfloat16 numbers
constexpr int64_t kTileSize = kTile * kDepth;
constexpr int kParts = 3;                // bfloat16 numbers whose sum is a float32 number

using Bfloat16 = uint16_t;

inline int64_t whole(int64_t count, int64_t unit) {
  return (count + unit - 1) / unit;
}

inline __mmask16 first(int64_t count) {
  return __mmask16((1u << std::clamp<int64_t>(count, 0, 16)) - 1);
}

inline __m512 widened(__m256i halves) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// Calls ``use(part, 32 bfloat16 numbers)`` with the parts of 32 numbers, whose sums they are, the largest first.
template <typename Use>
inline void split(__m512 low, __m512 high, Use use) {
  for (int part = 0; part < kParts; ++part) {
    __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    use(part, halves);
    low = _mm512_sub_ps(low, widened(_mm512_castsi512_si256(halves)));
    high = _mm512_sub_ps(high, widened(_mm512_extracti64x4_epi64(halves, 1)));
  }
}

// Left rows as tiles: [rows / 32][depth / 32][part][2][16, 32].
inline void pack_left(const float* left, int64_t rows, int64_t depth, Bfloat16* out) {
  int64_t steps = whole(depth, kDepth);
  for (int64_t row = 0; row < whole(rows, kSquare) * kSquare; ++row) {
    Bfloat16* panel = out + row / kSquare * steps * kParts * 2 * kTileSize + row % kSquare * kDepth;
    for (int64_t at = 0; at < depth; at += kDepth, panel += kParts * 2 * kTileSize) {
      const float* numbers = left + row * depth + at;
      __mmask16 low = row < rows ? first(depth - at) : 0, high = row < rows ? first(depth - at - 16) : 0;
      split(
          _mm512_maskz_loadu_ps(low, numbers), _mm512_maskz_loadu_ps(high, numbers + 16),
          [&](int part, __m512i halves) { _mm512_storeu_si512(panel + part * 2 * kTileSize, halves); });
    }
  }
}

inline void transpose(__m512i (&rows)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    for (int half = 0; half < 2; ++half) {
      t[i + 8 * half] = _mm512_shuffle_i32x4(rows[i + 8 * half], rows[i + 8 * half + 4], 0x88);
      t[i + 8 * half + 4] = _mm512_shuffle_i32x4(rows[i + 8 * half], rows[i + 8 * half + 4], 0xdd);
    }
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    rows[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    rows[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Columns of the right matrix as tiles in which two rows lie in one: [columns / 32][depth / 32][2][16, 16, 2]. Here they
// are rows of ``numbers``, each ``stride`` behind the one before.
inline void pack_rows(const Bfloat16* numbers, int64_t stride, int64_t columns, int64_t depth, Bfloat16* out) {
  int64_t steps = whole(depth, kDepth);
  for (int64_t column = 0; column < whole(columns, kSquare) * kSquare; column += kTile) {
    Bfloat16* tile = out + column / kSquare * steps * 2 * kTileSize + column % kSquare / kTile * kTileSize;
    for (int64_t at = 0; at < depth; at += kDepth, tile += 2 * kTileSize) {
      __m512i rows[16];
      auto mask = __mmask32((uint64_t(1) << std::min(kDepth, depth - at)) - 1);
      for (int64_t i = 0; i < kTile; ++i) {
        bool counts = column + i < columns;
        rows[i] = _mm512_maskz_loadu_epi16(counts ? mask : 0, numbers + (column + i) * stride + at);
      }
      transpose(rows);
      for (int i = 0; i < 16; ++i) {
        _mm512_storeu_si512(tile + i * kDepth, rows[i]);
      }
    }
  }
}

// The same of columns of ``numbers``.
inline void pack_columns(const Bfloat16* numbers, int64_t stride, int64_t columns, int64_t depth, Bfloat16* out) {
  alignas(64) static constexpr auto kInterleaved = [] {
    std::array<uint16_t, 32> order{};
    for (int i = 0; i < 32; ++i) {
      order[i] = uint16_t(i / 2 + i % 2 * 16);
    }
    return order;
  }();
  __m512i order = _mm512_load_si512(kInterleaved.data());
  int64_t steps = whole(depth, kDepth);
  for (int64_t column = 0; column < whole(columns, kSquare) * kSquare; column += kTile) {
    Bfloat16* tiles = out + column / kSquare * steps * 2 * kTileSize + column % kSquare / kTile * kTileSize;
    __mmask16 mask = first(columns - column);
    for (int64_t row = 0; row < steps * kDepth; row += 2) {
      const Bfloat16* place = numbers + row * stride + column;
      __m256i low = _mm256_maskz_loadu_epi16(row < depth ? mask : 0, place);
      __m256i high = _mm256_maskz_loadu_epi16(row + 1 < depth ? mask : 0, place + stride);
      __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
      Bfloat16* line = tiles + row / kDepth * 2 * kTileSize + row % kDepth / 2 * kDepth;
      _mm512_storeu_si512(line, _mm512_permutexvar_epi16(order, both));
    }
  }
}

// A thread's use of the unit.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    _tile_loadconfig(&shape);
  }
  ~Tiles() {
    _tile_release();
  }
  Tiles(const Tiles&) = delete;
};

inline void load_left(const Bfloat16* tiles) {
  _tile_loadd(4, tiles, 64);
  _tile_loadd(5, tiles + kTileSize, 64);
}

inline void load_right(const Bfloat16* tiles) {
  _tile_loadd(6, tiles, 64);
  _tile_loadd(7, tiles + kTileSize, 64);
}

inline void multiply_tiles() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// Sums of 32 x 32 in tiles 0 to 3 += the products of a left and a right panel, the smallest first.
inline void multiply_panels(const Bfloat16* left, const Bfloat16* right, int64_t steps) {
  for (int64_t step = 0; step < steps; ++step, left += kParts * 2 * kTileSize, right += 2 * kTileSize) {
    load_right(right);
    for (int part = kParts - 1; part >= 0; --part) {
      load_left(left + part * 2 * kTileSize);
      multiply_tiles();
    }
  }
}

// Sums of 32 x 32, of which some count, that lie in memory in rows of ``stride`` += the products of two panels; without
// ``accumulate`` they begin with zero.
inline void update_sums(
    float* sums, int64_t stride, int64_t rows, int64_t columns, bool accumulate, const Bfloat16* left,
    const Bfloat16* right, int64_t steps) {
  bool is_whole = rows >= kSquare && columns >= kSquare;
  alignas(64) float block[kSquare * kSquare];
  float* place = is_whole ? sums : block;
  int64_t ld = is_whole ? stride : kSquare, bytes = ld * sizeof(float);
  if (accumulate) {
    for (int64_t i = 0; !is_whole && i < kSquare * kSquare; ++i) {
      int64_t row = i / kSquare, column = i % kSquare;
      block[i] = row < rows && column < columns ? sums[row * stride + column] : 0;
    }
    _tile_loadd(0, place, bytes);
    _tile_loadd(1, place + kTile, bytes);
    _tile_loadd(2, place + kTile * ld, bytes);
    _tile_loadd(3, place + kTile * ld + kTile, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  multiply_panels(left, right, steps);
  _tile_stored(0, place, bytes);
  _tile_stored(1, place + kTile, bytes);
  _tile_stored(2, place + kTile * ld, bytes);
  _tile_stored(3, place + kTile * ld + kTile, bytes);
  if (!is_whole) {
    for (int64_t row = 0; row < std::min(rows, kSquare); ++row) {
      std::copy_n(block + row * kSquare, std::min(columns, kSquare), sums + row * stride);
    }
  }
}

// Left rows as tiles, from which products with columns of bfloat16 weights are computed.
class LeftTiles {
 public:
  // Packs rows of ``depth`` numbers in scratch memory of the thread that makes it, on all threads where ``together``.
  LeftTiles(const float* left, int64_t rows, int64_t depth, int scratch_number, bool together)
      : rows_(rows), depth_(depth), panel_(whole(depth, kDepth) * kParts * 2 * kTileSize) {
    tiles_ = tiles_in(scratch_number, whole(rows, kSquare) * panel_);
    auto pack = [&](Range part) {
      pack_left(left + part.begin * depth, part.size(), depth, tiles_ + part.begin / kSquare * panel_);
    };
    together ? in_parts(rows, kSquare, double(rows) * depth, pack) : pack({0, rows});
  }

  // Columns of products with a weight's rows from ``first_row`` on, or with its transpose. ``sum`` begins with column 0.
  void multiply(
      const Weight& weight, bool transposed, int64_t first_row, Range columns, bool accumulate, float* sum,
      int64_t stride) const {
    Tiles in_use;
    auto* numbers = static_cast<const Bfloat16*>(weight.data);
    int64_t ld = weight.columns;
    for (int64_t column = columns.begin; column < columns.end; column += kColumns) {
      Range block{column, std::min(column + kColumns, columns.end)};
      for (int64_t at = 0; at < depth_; at += kSteps * kDepth) {
        int64_t depth = std::min(kSteps * kDepth, depth_ - at), steps = whole(depth, kDepth);
        Bfloat16* right = tiles_in(7, whole(block.size(), kSquare) * steps * 2 * kTileSize);
        transposed ? pack_rows(numbers + block.begin * ld + at, ld, block.size(), depth, right)
                   : pack_columns(numbers + (first_row + at) * ld + block.begin, ld, block.size(), depth, right);
        const Bfloat16* left = tiles_ + at / kDepth * kParts * 2 * kTileSize;
        for (int64_t row = 0; row < rows_; row += kSquare, left += panel_) {
          const Bfloat16* panel = right;
          for (int64_t i = block.begin; i < block.end; i += kSquare, panel += steps * 2 * kTileSize) {
            update_sums(
                sum + row * stride + i, stride, rows_ - row, block.end - i, accumulate || at, left, panel, steps);
          }
        }
      }
    }
  }

 private:
  // Tiles are read fastest where their rows are lines of the cache.
  static Bfloat16* tiles_in(int scratch_number, int64_t size) {
    auto address = reinterpret_cast<uintptr_t>(scratch(scratch_number, size / 2 + 16));
    return reinterpret_cast<Bfloat16*>((address + 63) & ~uintptr_t(63));
  }

  int64_t rows_, depth_, panel_;
  Bfloat16* tiles_;
};

#else

inline bool request_tiles() {
  return false;
}

class LeftTiles {
 public:
  LeftTiles(const float*, int64_t, int64_t, int, bool) {}
  void multiply(const Weight&, bool, int64_t, Range, bool, float*, int64_t) const {}
};

#endif

}  // namespace cpo
