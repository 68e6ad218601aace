// Linear layers with and without an adapter.
#pragma once

#include "operation.h"

namespace cpo {

struct LinearOptions {
  float scale;  // of the adapter
  int rank;     // 0: there is none
  int columns, bits, group;
  bool merged;  // the weight has the adapter in it already, which only its own gradient is to reach
};

// Inputs: dy, x, z, A, B, the weight. Outputs: dx, dA, dB; without an adapter: dy, the weight, and dx.
class LinearGradient : public Shared<LinearGradient> {
 public:
  LinearGradient(LinearOptions options, bool inner) : options_(options), inner_(inner) {}
  DEFINE_NAME(CPOLinearGradient)

 private:
  void compute(const Arrays& in, Arrays& out) override {
    int64_t rank = options_.rank, m = count_rows(in[0]), n = in[0].shape(-1), k = options_.columns;
    Weight weight(in, rank ? 5 : 1, k, options_.bits, options_.group);
    const float* dy = in[0].data<float>();
    float* dx = out[0].data<float>();
    int64_t unit = weight.bits ? std::max<int64_t>(kUnit, weight.group) : kUnit, least = unit;
    std::optional<Activations> slopes;
    if (inner_) {
      slopes.emplace(dy, m, n, weight, 6, true);
      unit = std::max(unit, slopes->unit()), least = slopes->least();
    }
    if (!rank) {
      return in_parts(
          k, unit, double(m) * n * k, [&](Range c) { times_columns(weight, c, *slopes, dx); }, least);
    }
    const float *x = in[1].data<float>(), *z = in[2].data<float>(), *a = in[3].data<float>(),
                *b = in[4].data<float>();
    float *da = out[1].data<float>(), *db = out[2].data<float>();
    std::vector<float> dz(m * rank);
    in_parts(m, kUnit, double(m) * n * rank, [&](Range r) {
      multiply(
          kPlain, kTransposed, r.size(), rank, n, options_.scale, dy + r.begin * n, n, b, n, 0,
          dz.data() + r.begin * rank, rank);
    });
    in_parts(n, kUnit, double(m) * n * rank, [&](Range c) {
      multiply(
          kTransposed, kPlain, rank, c.size(), m, options_.scale, z, rank, dy + c.begin, n, 0, db + c.begin, n);
    });
    in_parts(k, unit, double(m) * n * k, [&](Range c) {
      multiply(
          kTransposed, kPlain, c.size(), rank, m, 1, x + c.begin, k, dz.data(), rank, 0, da + c.begin * rank, rank);
      if (inner_) {
        times_columns(weight, c, *slopes, dx);
      }
      if (inner_ && !options_.merged) {
        multiply(
            kPlain, kTransposed, m, c.size(), rank, 1, dz.data(), rank, a + c.begin * rank, rank, 1, dx + c.begin, k);
      }
    }, least);
  }

  LinearOptions options_;
  bool inner_;  // whether something below is trained, so that dx is needed
};

// y = x W^T + scale * (x A) B, or only x W^T where the adapter is in the weight. Inputs: x [..., K], A [K, R], B [R, N],
// the weight; outputs: y and z = x A.
class Linear : public Shared<Linear> {
 public:
  explicit Linear(LinearOptions options) : options_(options) {}
  DEFINE_NAME(CPOLinear)

  Arrays vjp(
      const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
      const Arrays& outputs) override {
    bool inner = std::find(argnums.begin(), argnums.end(), 0) != argnums.end();
    Arrays inputs{rows_of(cotangents[0])};
    std::vector<Shape> shapes{inner ? primals[0].shape() : Shape{0}};
    if (options_.rank) {
      inputs.insert(inputs.end(), {computed_again(primals[0]), outputs[1], primals[1], primals[2]});
      shapes.insert(shapes.end(), {primals[1].shape(), primals[2].shape()});
    }
    int frozen = options_.rank ? 3 : 1;
    inputs.insert(inputs.end(), primals.begin() + frozen, primals.end());
    Arrays gradients = apply<LinearGradient>(shapes, inputs, options_, inner);
    return asked_for(argnums, frozen, [&](int argnum) { return gradients[argnum]; });
  }

 private:
  void compute(const Arrays& in, Arrays& out) override {
    int64_t rank = options_.rank, m = count_rows(in[0]), k = options_.columns;
    Weight weight(in, rank ? 3 : 1, k, options_.bits, options_.group);
    int64_t n = weight.rows;
    const float* x = in[0].data<float>();
    float *y = out[0].data<float>(), *z = rank ? out[1].data<float>() : nullptr;
    if (rank) {
      const float* a = in[1].data<float>();
      in_parts(m, kUnit, double(m) * k * rank, [&](Range r) {
        multiply(kPlain, kPlain, r.size(), rank, k, 1, x + r.begin * k, k, a, rank, 0, z + r.begin * rank, rank);
      });
    }
    Activations activations(x, m, k, weight, 6, true);
    in_parts(n, activations.unit(), double(m) * n * k, [&](Range r) {
      times_rows(weight, r, activations, y, n);
      if (rank && !options_.merged) {
        const float* b = in[2].data<float>();
        multiply(kPlain, kPlain, m, r.size(), rank, options_.scale, z, rank, b + r.begin, n, 1, y + r.begin, n);
      }
    }, activations.least());
  }

  LinearOptions options_;
};

inline Arrays linear(const Arrays& inputs, const double* numbers) {
  require(is_wide(inputs[0]) && inputs[0].ndim() > 0 && inputs[0].shape(-1) > 0);
  LinearOptions options{
      float(numbers[0]), int(numbers[1]), inputs[0].shape(-1), int(numbers[2]), int(numbers[3]), numbers[4] != 0};
  size_t first = options.rank ? 3 : 1;
  require(is_weight(inputs, first, options.columns, options.bits, options.group));
  require(
      !options.rank ||
      (is_wide(inputs[1]) && is_wide(inputs[2]) && inputs[1].shape() == Shape{options.columns, options.rank} &&
       inputs[2].shape() == Shape{options.rank, inputs[first].shape(0)}));
  Arrays all = inputs;
  all[0] = rows_of(all[0]);
  for (size_t i = 1; i < all.size(); ++i) {
    all[i] = rows_of(all[i]);
  }
  int outputs = all[first].shape(0);
  std::vector<Shape> shapes{with_last(all[0].shape(), outputs)};
  if (options.rank) {
    shapes.push_back({int(count_rows(all[0])), options.rank});
  }
  return apply<Linear>(shapes, all, options);
}

}  // namespace cpo
