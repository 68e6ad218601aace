// Exponentials and sums of rows that a compiler turns into vector instructions.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

namespace cpo {

constexpr float kPerLog2 = 1.4426950408889634f, kLog2 = 0.6931471805599453f;
// Powers below this one are zero, so that nothing they are multiplied with becomes subnormal.
constexpr float kLowest = -44;

// 2**x for x up to 127, to a relative error of 2e-7.
inline float power_of_two(float x) {
  float kept = x < kLowest ? kLowest : x;
  float rounded = kept + 12582912.0f;
  float r = kept - (rounded - 12582912.0f);
  float power = r * 1.326472731307e-3f + 9.671512991190e-3f;
  power = power * r + 5.550733581185e-2f;
  power = power * r + 2.402224242689e-1f;
  power = power * r + 6.931470036507e-1f;
  power = power * r + 1.0f;
  float result = std::bit_cast<float>(std::bit_cast<int32_t>(power) + (std::bit_cast<int32_t>(rounded) << 23));
  return x < kLowest ? 0.0f : result;
}

inline float sigmoid(float x) {
  return 1.0f / (1.0f + power_of_two(std::min(x * -kPerLog2, -kLowest)));
}

// Sums and maxima of a row in a fixed order, in as many lanes as a processor may have.
constexpr int kLanes = 16;

template <typename Value>
inline float sum_of(int64_t count, Value value) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += value(i + lane);
    }
  }
  for (int lane = 0; i < count; ++i, ++lane) {
    lanes[lane] += value(i);
  }
  for (int half = kLanes / 2; half; half /= 2) {
    for (int lane = 0; lane < half; ++lane) {
      lanes[lane] += lanes[lane + half];
    }
  }
  return lanes[0];
}

inline float max_of(const float* row, int64_t count) {
  float lanes[kLanes];
  std::fill(lanes, lanes + kLanes, row[0]);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = lanes[lane] < row[i + lane] ? row[i + lane] : lanes[lane];
    }
  }
  for (; i < count; ++i) {
    lanes[0] = std::max(lanes[0], row[i]);
  }
  return *std::max_element(lanes, lanes + kLanes);
}

}  // namespace cpo
