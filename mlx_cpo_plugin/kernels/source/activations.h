// Activations, which keep nothing but their inputs.
#pragma once

#include "numbers.h"
#include "operation.h"

namespace cpo {

inline float silu_slope(float x, float open) {
  return open * (1 + x * (1 - open));
}

// Inputs: dy, gate, x. Outputs: d gate, dx.
class SiluGateGradient : public Shared<SiluGateGradient> {
 public:
  DEFINE_NAME(CPOSiluGateGradient)

 private:
  void compute(const Arrays& in, Arrays& out) override {
    in_parts(in[0].size(), kLanes, 30.0 * in[0].size(), [&](Range range) {
      const float *dy = in[0].data<float>(), *gate = in[1].data<float>(), *x = in[2].data<float>();
      float *dgate = out[0].data<float>(), *dx = out[1].data<float>();
      for (int64_t i = range.begin; i < range.end; ++i) {
        float open = sigmoid(gate[i]);
        dgate[i] = dy[i] * x[i] * silu_slope(gate[i], open);
        dx[i] = dy[i] * gate[i] * open;
      }
    });
  }
};

// silu(gate) * x
class SiluGate : public Shared<SiluGate> {
 public:
  DEFINE_NAME(CPOSiluGate)

  bool is_cheap() const override {
    return true;
  }

  Arrays vjp(
      const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override {
    Arrays gradients = apply<SiluGateGradient>(
        {primals[0].shape(), primals[1].shape()}, {rows_of(cotangents[0]), primals[0], primals[1]});
    return asked_for(argnums, 2, [&](int argnum) { return gradients[argnum]; });
  }

 private:
  void compute(const Arrays& in, Arrays& out) override {
    in_parts(in[0].size(), kLanes, 20.0 * in[0].size(), [&](Range range) {
      const float *gate = in[0].data<float>(), *x = in[1].data<float>();
      float* y = out[0].data<float>();
      for (int64_t i = range.begin; i < range.end; ++i) {
        y[i] = gate[i] * sigmoid(gate[i]) * x[i];
      }
    });
  }
};

inline Arrays silu_gate(const Arrays& inputs, const double*) {
  require(is_wide(inputs[0]) && is_wide(inputs[1]) && inputs[0].shape() == inputs[1].shape());
  return apply<SiluGate>({inputs[0].shape()}, {rows_of(inputs[0]), rows_of(inputs[1])});
}

// The approximation of GELU with tanh, of which (1 + tanh(u)) / 2 is sigmoid(2 u).
inline float gelu_gate(float x) {
  return 1.5957691216057308f * (x + 0.044715f * x * x * x);  // 2 * sqrt(2 / pi)
}

// Inputs: dy, x.
class GeluGradient : public Shared<GeluGradient> {
 public:
  DEFINE_NAME(CPOGeluGradient)

 private:
  void compute(const Arrays& in, Arrays& out) override {
    in_parts(in[0].size(), kLanes, 30.0 * in[0].size(), [&](Range range) {
      const float *dy = in[0].data<float>(), *x = in[1].data<float>();
      float* dx = out[0].data<float>();
      for (int64_t i = range.begin; i < range.end; ++i) {
        float open = sigmoid(gelu_gate(x[i]));
        float steepness = 1.5957691216057308f * (1 + 3 * 0.044715f * x[i] * x[i]);
        dx[i] = dy[i] * (open + x[i] * open * (1 - open) * steepness);
      }
    });
  }
};

class Gelu : public Shared<Gelu> {
 public:
  DEFINE_NAME(CPOGelu)

  Arrays vjp(
      const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override {
    return asked_for(argnums, 1, [&](int) {
      return apply<GeluGradient>({primals[0].shape()}, {rows_of(cotangents[0]), primals[0]})[0];
    });
  }

 private:
  void compute(const Arrays& in, Arrays& out) override {
    in_parts(in[0].size(), kLanes, 20.0 * in[0].size(), [&](Range range) {
      const float* x = in[0].data<float>();
      float* y = out[0].data<float>();
      for (int64_t i = range.begin; i < range.end; ++i) {
        y[i] = x[i] * sigmoid(gelu_gate(x[i]));
      }
    });
  }
};

inline Arrays gelu(const Arrays& inputs, const double*) {
  require(is_wide(inputs[0]));
  return apply<Gelu>({inputs[0].shape()}, {rows_of(inputs[0])});
}

}  // namespace cpo
