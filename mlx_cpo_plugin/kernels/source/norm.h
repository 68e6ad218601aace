// Root mean square normalisation.
#pragma once

#include "numbers.h"
#include "operation.h"

namespace cpo {

// Inputs: dy, x, the weight. Output: dx.
class NormGradient : public Shared<NormGradient> {
 public:
  explicit NormGradient(float epsilon) : epsilon_(epsilon) {}
  DEFINE_NAME(CPONormGradient)

 private:
  void compute(const Arrays& in, Arrays& out) override {
    int64_t size = in[1].shape(-1);
    const float* weight = in[2].data<float>();
    in_parts(count_rows(in[1]), 1, 10.0 * in[1].size(), [&](Range rows) {
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        const float *dy = in[0].data<float>() + row * size, *x = in[1].data<float>() + row * size;
        float* dx = out[0].data<float>() + row * size;
        float squares = sum_of(size, [&](int64_t i) { return x[i] * x[i]; });
        float along = sum_of(size, [&](int64_t i) { return dy[i] * weight[i] * x[i]; });
        float factor = 1.0f / std::sqrt(squares / size + epsilon_);
        float slope = along * factor * factor * factor / size;
        for (int64_t i = 0; i < size; ++i) {
          dx[i] = dy[i] * weight[i] * factor - x[i] * slope;
        }
      }
    });
  }

  float epsilon_;
};

// Inputs: x [..., D], the weight [D].
class Norm : public Shared<Norm> {
 public:
  explicit Norm(float epsilon) : epsilon_(epsilon) {}
  DEFINE_NAME(CPONorm)

  bool is_cheap() const override {
    return true;
  }

  Arrays vjp(
      const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override {
    return asked_for(argnums, 1, [&](int) {
      return apply<NormGradient>({primals[0].shape()}, {rows_of(cotangents[0]), primals[0], primals[1]}, epsilon_)[0];
    });
  }

 private:
  void compute(const Arrays& in, Arrays& out) override {
    int64_t size = in[0].shape(-1);
    const float* weight = in[1].data<float>();
    in_parts(count_rows(in[0]), 1, 6.0 * in[0].size(), [&](Range rows) {
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        const float* x = in[0].data<float>() + row * size;
        float* y = out[0].data<float>() + row * size;
        float squares = sum_of(size, [&](int64_t i) { return x[i] * x[i]; });
        float factor = 1.0f / std::sqrt(squares / size + epsilon_);
        for (int64_t i = 0; i < size; ++i) {
          y[i] = x[i] * factor * weight[i];
        }
      }
    });
  }

  float epsilon_;
};

inline Arrays norm(const Arrays& inputs, const double* numbers) {
  const array &x = inputs[0], &weight = inputs[1];
  require(is_wide(x) && is_wide(weight) && x.ndim() > 0 && weight.shape() == Shape{x.shape(-1)} && x.shape(-1) > 0);
  return apply<Norm>({inputs[0].shape()}, {rows_of(inputs[0]), rows_of(inputs[1])}, float(numbers[0]));
}

}  // namespace cpo
