// Hidden states -> log-probs of target tokens, without all their logits ever being in memory at once.
#pragma once

#include "numbers.h"
#include "operation.h"

namespace cpo {

struct HeadOptions {
  bool differentiate;
  int columns, bits, group;
};

// Log-probs and logits of target tokens, and the gradient of the former with respect to the hidden states: logits
// exist for a block of the vocabulary at a time. Inputs: hidden [S, D], targets int32 [S], the weight [V, D].
class Head : public Shared<Head> {
 public:
  explicit Head(HeadOptions options) : options_(options) {}
  DEFINE_NAME(CPOHead)

 private:
  // What has been summed over a part of the vocabulary, relative to the highest logit so far.
  struct Sums {
    std::vector<float> highest, total, gradient;
  };

  static constexpr int64_t kRows = 256, kLogits = 1 << 17;
  // Numbers that the sums of all parts have at most, unless there are as many threads.
  static constexpr int64_t kMostSums = 1 << 22;

  void compute(const Arrays& in, Arrays& out) override {
    Weight weight(in, 2, options_.columns, options_.bits, options_.group);
    for (int64_t begin = 0; begin < in[0].shape(0); begin += kRows) {
      rows(weight, in, out, {begin, std::min<int64_t>(begin + kRows, in[0].shape(0))});
    }
  }

  void rows(const Weight& weight, const Arrays& in, Arrays& out, Range range) {
    int64_t size = weight.columns, count = range.size();
    Activations hidden(in[0].data<float>() + range.begin * size, count, size, weight, 6, true);
    const int32_t* targets = in[1].data<int32_t>() + range.begin;
    float* logits = out[1].data<float>() + range.begin;
    int64_t parts = count_parts(std::min(weight.rows / kPacked, kMostSums / (count * size)));
    std::vector<Sums> sums(parts);
    in_turn(parts, [&](int64_t part) {
      over_vocabulary(
          weight, part_of(weight.rows, part, parts, hidden.unit()), hidden, targets, logits, sums[part]);
    });
    for (int64_t row = 0; row < count; ++row) {
      float highest = -INFINITY, total = 0;
      for (auto& part : sums) {
        highest = std::max(highest, part.highest[row]);
      }
      for (auto& part : sums) {
        total += part.total[row] * power_of_two(part.highest[row] - highest);
      }
      out[0].data<float>()[range.begin + row] = logits[row] - kLog2 * (highest + std::log2(total));
      if (options_.differentiate) {
        float* gradient = out[2].data<float>() + (range.begin + row) * size;
        int64_t stride;
        const float* target =
            weight.wide({targets[row], targets[row] + 1}, {0, size}, scratch(0, size), stride);
        for (int64_t i = 0; i < size; ++i) {
          gradient[i] = target[i];
        }
        for (auto& part : sums) {
          float share = power_of_two(part.highest[row] - highest) / total;
          for (int64_t i = 0; i < size; ++i) {
            gradient[i] -= share * part.gradient[row * size + i];
          }
        }
      }
    }
  }

  void over_vocabulary(
      const Weight& weight, Range part, const Activations& hidden, const int32_t* targets, float* logits,
      Sums& sums) {
    int64_t size = weight.columns, count = hidden.m;
    sums.highest.assign(count, -INFINITY), sums.total.assign(count, 0);
    sums.gradient.assign(options_.differentiate ? count * size : 0, 0);
    int64_t step = std::clamp<int64_t>(kLogits / count / kUnit * kUnit, kUnit, weight.is_wide() ? 4096 : 256);
    for (int64_t begin = part.begin; begin < part.end; begin += step) {
      Range ids{begin, std::min(begin + step, part.end)};
      int64_t stride = 0, width = ids.size();
      const float* wide = nullptr;
      float* block = scratch(5, count * width);
      if (hidden.tiles) {
        hidden.tiles->multiply(weight, true, 0, ids, false, block - ids.begin, width);
      } else {
        wide = weight.wide(ids, {0, size}, weight.is_wide() ? nullptr : scratch(4, width * size), stride);
        multiply(kPlain, kTransposed, count, width, size, 1, hidden.data, size, wide, stride, 0, block, width);
      }
      for (int64_t row = 0; row < count; ++row) {
        float* values = block + row * width;
        if (targets[row] >= ids.begin && targets[row] < ids.end) {
          logits[row] = values[targets[row] - ids.begin];
        }
        float highest = std::max(sums.highest[row], max_of(values, width) * kPerLog2);
        float kept = power_of_two(std::max(sums.highest[row] - highest, -200.0f));
        for (int64_t i = 0; i < width; ++i) {
          values[i] = power_of_two(values[i] * kPerLog2 - highest);
        }
        sums.total[row] = sums.total[row] * kept + sum_of(width, [&](int64_t i) { return values[i]; });
        sums.highest[row] = highest;
        if (options_.differentiate && kept != 1) {
          float* gradient = &sums.gradient[row * size];
          for (int64_t i = 0; i < size; ++i) {
            gradient[i] *= kept;
          }
        }
      }
      if (options_.differentiate && hidden.tiles) {
        LeftTiles weights(block, count, width, 4, false);
        weights.multiply(weight, false, ids.begin, {0, size}, true, sums.gradient.data(), size);
      } else if (options_.differentiate) {
        multiply(kPlain, kPlain, count, size, width, 1, block, width, wide, stride, 1, sums.gradient.data(), size);
      }
    }
  }

  HeadOptions options_;
};

inline Arrays head(const Arrays& inputs, const double* numbers) {
  const array &hidden = inputs[0], &targets = inputs[1];
  require(is_wide(hidden) && hidden.ndim() == 2 && targets.dtype() == mx::int32);
  require(targets.shape() == Shape{hidden.shape(0)});
  require(is_weight(inputs, 2, hidden.shape(1), int(numbers[1]), int(numbers[2])));
  int rows = inputs[0].shape(0), size = inputs[0].shape(1);
  HeadOptions options{numbers[0] != 0, size, int(numbers[1]), int(numbers[2])};
  Arrays all;
  for (auto& input : inputs) {
    all.push_back(rows_of(input));
  }
  return apply<Head>({{rows}, {rows}, options.differentiate ? Shape{rows, size} : Shape{0}}, all, options);
}

}  // namespace cpo
