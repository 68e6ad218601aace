// Weights as they are stored: float32, half precision, or packed.
#pragma once

#include <bit>
#include <cstdint>

#include "mlx/array.h"
#include "threads.h"

namespace cpo {

namespace mx = mlx::core;
using mx::array;
using mx::Shape;
using Arrays = std::vector<array>;

inline float widened_bfloat16(uint16_t bits) {
  return std::bit_cast<float>(uint32_t(bits) << 16);
}

// A weight [rows, columns] as it is stored: float32, bfloat16, float16, or packed by mx.quantize in its affine mode.
struct Weight {
  int64_t rows, columns;
  int bits, group;
  const void* data;
  const void* scales;
  const void* biases;
  mx::Dtype dtype, scales_dtype;

  // Packed weights have their scales and biases behind them.
  Weight(const Arrays& arrays, size_t first, int64_t columns, int bits, int group)
      : rows(arrays[first].shape(0)),
        columns(columns),
        bits(bits),
        group(group),
        data(arrays[first].data<void>()),
        scales(bits ? arrays[first + 1].data<void>() : nullptr),
        biases(bits ? arrays[first + 2].data<void>() : nullptr),
        dtype(arrays[first].dtype()),
        scales_dtype(bits ? arrays[first + 1].dtype() : mx::float32) {}

  // A float32 matrix.
  Weight(const float* numbers, int64_t rows, int64_t columns)
      : rows(rows),
        columns(columns),
        bits(0),
        group(0),
        data(numbers),
        scales(nullptr),
        biases(nullptr),
        dtype(mx::float32),
        scales_dtype(mx::float32) {}

  bool is(mx::Dtype kind) const {
    return !bits && dtype == kind;
  }

  bool is_wide() const {
    return is(mx::float32);
  }

  // Returns rows of some columns in float32, in their own place or in ``buffer``; sets how far apart the rows lie.
  const float* wide(Range of_rows, Range of_columns, float* buffer, int64_t& stride) const {
    if (is_wide()) {
      stride = columns;
      return static_cast<const float*>(data) + of_rows.begin * columns + of_columns.begin;
    }
    stride = of_columns.size();
    for (int64_t row = of_rows.begin; row < of_rows.end; ++row) {
      widen(row, of_columns, buffer + (row - of_rows.begin) * stride);
    }
    return buffer;
  }

 private:
  void widen(int64_t row, Range of_columns, float* out) const {
    int64_t count = of_columns.size(), start = row * columns + of_columns.begin;
    if (bits) {
      unpack(row, of_columns, out);
    } else if (dtype == mx::bfloat16) {
      auto* in = static_cast<const uint16_t*>(data) + start;
      for (int64_t i = 0; i < count; ++i) {
        out[i] = widened_bfloat16(in[i]);
      }
    } else {
      auto* in = static_cast<const mx::float16_t*>(data) + start;
      for (int64_t i = 0; i < count; ++i) {
        out[i] = static_cast<float>(in[i]);
      }
    }
  }

  float number(const void* numbers, int64_t index) const {
    if (scales_dtype == mx::float32) {
      return static_cast<const float*>(numbers)[index];
    }
    if (scales_dtype == mx::bfloat16) {
      return widened_bfloat16(static_cast<const uint16_t*>(numbers)[index]);
    }
    return static_cast<float>(static_cast<const mx::float16_t*>(numbers)[index]);
  }

  // Columns begin and end with whole groups, and so with whole bytes.
  void unpack(int64_t row, Range of_columns, float* out) const {
    int per_byte = 8 / bits;
    auto* packed = static_cast<const uint8_t*>(data) + (row * columns + of_columns.begin) / per_byte;
    int64_t first = row * columns / group;
    for (int64_t at = of_columns.begin; at < of_columns.end; at += group) {
      float scale = number(scales, first + at / group), bias = number(biases, first + at / group);
      for (int64_t i = 0; i < group / per_byte; ++i, ++packed) {
        for (int j = 0; j < per_byte; ++j) {
          *out++ = scale * float((*packed >> (j * bits)) & ((1 << bits) - 1)) + bias;
        }
      }
    }
  }
};

}  // namespace cpo
