// Rotary position embedding.
#pragma once

#include "operation.h"

namespace cpo {

// Rotates the first ``2 * cosines.shape(-1)`` numbers of each row. Inputs: x [B, H, N, D], cosines and sines
// [1 or B, N, R]; backwards it turns the other way.
class Rotation : public Shared<Rotation> {
 public:
  Rotation(bool neighbours, bool backwards) : neighbours_(neighbours), backwards_(backwards) {}
  DEFINE_NAME(CPORotation)

  bool splits_heads() const override {
    return true;
  }

  Arrays vjp(
      const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override {
    return asked_for(argnums, 1, [&](int) {
      return apply<Rotation>(
          {primals[0].shape()}, {cotangents[0], primals[1], primals[2]}, neighbours_,
          !backwards_)[0];
    });
  }

 private:
  void compute(const Arrays& in, Arrays& out) override {
    Heads x(in[0]), y(out[0]);
    int64_t heads = in[0].shape(1), count = in[0].shape(2), size = in[0].shape(3), half = in[1].shape(-1);
    int64_t table_stride = in[1].shape(0) > 1 ? count * half : 0;
    float sign = backwards_ ? -1 : 1;
    in_parts(in[0].shape(0) * count, 1, 4.0 * in[0].size(), [&](Range rows) {
      for (int64_t at = rows.begin; at < rows.end; ++at) {
        int64_t batch = at / count, row = at % count;
        const float* cosines = in[1].data<float>() + batch * table_stride + row * half;
        const float* sines = in[2].data<float>() + batch * table_stride + row * half;
        for (int64_t head = 0; head < heads; ++head) {
          const float* from = x.head(batch, head) + row * x.row_stride;
          float* to = y.head(batch, head) + row * y.row_stride;
          int64_t first = neighbours_ ? 2 : 1, second = neighbours_ ? 1 : half;
          for (int64_t i = 0; i < half; ++i) {
            float left = from[i * first], right = from[i * first + second], sine = sign * sines[i];
            to[i * first] = left * cosines[i] - right * sine;
            to[i * first + second] = left * sine + right * cosines[i];
          }
          std::copy(from + 2 * half, from + size, to + 2 * half);
        }
      }
    });
  }

  bool neighbours_, backwards_;
};

inline Arrays rotation(const Arrays& inputs, const double* numbers) {
  const array &x = inputs[0], &cosines = inputs[1], &sines = inputs[2];
  require(is_wide(x) && is_wide(cosines) && is_wide(sines) && x.ndim() == 4 && cosines.ndim() == 3);
  require(cosines.shape() == sines.shape() && (cosines.shape(0) == 1 || cosines.shape(0) == x.shape(0)));
  require(cosines.shape(1) == x.shape(2) && 2 * cosines.shape(2) <= x.shape(3));
  return apply<Rotation>(
      {inputs[0].shape()}, {inputs[0], rows_of(inputs[1]), rows_of(inputs[2])}, numbers[0] != 0, false);
}

}  // namespace cpo
