// What all operations have in common, as MLX sees them.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "products.h"

namespace cpo {

// The operations that wait for their turn or are at work. MLX takes the memory of dozens before the first is done, and
// a few keep the cores as busy.
class Waiting {
 public:
  void enter() {
    std::unique_lock lock(mutex_);
    left_.wait(lock, [&] { return count_ < kMost; });
    ++count_;
  }

  void leave() {
    {
      std::lock_guard lock(mutex_);
      --count_;
    }
    left_.notify_one();
  }

 private:
  static constexpr int kMost = 4;

  int count_ = 0;
  std::mutex mutex_;
  std::condition_variable left_;
};

inline Waiting waiting;

// One of them, until it is gone: also where its memory cannot be had.
class Turn {
 public:
  Turn() {
    waiting.enter();
  }
  ~Turn() {
    waiting.leave();
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;
};

// An operation whose outputs are computed by ``compute`` when its turn comes.
class Kernel : public mx::Primitive {
 public:
  Kernel() : Primitive(mx::default_stream(mx::default_device())) {}

  // Whether computing it twice costs less than keeping its output until the backward pass.
  virtual bool is_cheap() const {
    return false;
  }

  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error("These kernels run on a CPU.");
  }

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    auto turn = std::make_shared<Turn>();
    for (auto& output : outputs) {
      splits_heads() && output.ndim() == 4 ? allocate_heads(output)
                                           : output.set_data(mx::allocator::malloc(output.nbytes()));
    }
    Arrays in, out;
    for (auto& input : inputs) {
      in.push_back(array::unsafe_weak_copy(input));
    }
    for (auto& output : outputs) {
      out.push_back(array::unsafe_weak_copy(output));
    }
    mx::cpu::get_command_encoder(stream()).dispatch(
        [this, in = std::move(in), out = std::move(out), self = keep_alive(), turn = std::move(turn)]() mutable {
          compute(in, out);
          turn.reset();
        });
  }

 protected:
  virtual void compute(const Arrays& in, Arrays& out) = 0;

  virtual std::shared_ptr<Primitive> keep_alive() = 0;

  // Whether outputs are arrays of heads [B, H, N, D], which lie in memory as [B, N, H, D]: what splits and joins heads is
  // then no copy.
  virtual bool splits_heads() const {
    return false;
  }

  static void allocate_heads(array& output) {
    int64_t heads = output.shape(1), rows = output.shape(2), size = output.shape(3);
    array::Flags flags{};
    flags.contiguous = true;
    flags.row_contiguous = heads == 1 || rows == 1;
    flags.col_contiguous = false;
    mx::Strides strides{rows * heads * size, size, heads * size, 1};
    output.set_data(mx::allocator::malloc(output.nbytes()), output.size(), strides, flags);
  }
};

template <typename Derived>
class Shared : public Kernel, public std::enable_shared_from_this<Derived> {
 protected:
  std::shared_ptr<mx::Primitive> keep_alive() override {
    return this->shared_from_this();
  }
};

template <typename Operation, typename... Arguments>
Arrays apply(std::vector<Shape> shapes, Arrays inputs, Arguments... arguments) {
  std::vector<mx::Dtype> dtypes(shapes.size(), mx::float32);
  return array::make_arrays(
      std::move(shapes), dtypes, std::make_shared<Operation>(arguments...), std::move(inputs));
}

inline void require(bool condition) {
  if (!condition) {
    throw std::invalid_argument("it does not take arrays of these shapes and dtypes");
  }
}

inline bool is_wide(const array& x) {
  return x.dtype() == mx::float32;
}

// Whether a weight, stored as ``bits`` and ``group`` say and the last of ``inputs``, takes rows of ``columns`` numbers.
inline bool is_weight(const Arrays& inputs, size_t first, int columns, int bits, int group) {
  if (inputs.size() != first + (bits ? 3 : 1) || inputs[first].ndim() != 2) {
    return false;
  }
  const array& weight = inputs[first];
  if (!bits) {
    bool known = is_wide(weight) || weight.dtype() == mx::bfloat16 || weight.dtype() == mx::float16;
    return known && weight.shape(1) == columns;
  }
  const array &scales = inputs[first + 1], &biases = inputs[first + 2];
  bool known = is_wide(scales) || scales.dtype() == mx::bfloat16 || scales.dtype() == mx::float16;
  return weight.dtype() == mx::uint32 && known && (bits == 2 || bits == 4 || bits == 8) && group >= 8 &&
      columns % group == 0 && int64_t(weight.shape(1)) * 32 == int64_t(columns) * bits &&
      scales.shape() == Shape{weight.shape(0), columns / group} && biases.shape() == scales.shape() &&
      biases.dtype() == scales.dtype();
}

inline array rows_of(const array& x) {
  return mx::contiguous(x);
}

// Whether an operation only says how numbers are laid out.
inline bool is_layout(const mx::Primitive& primitive) {
  std::string name = primitive.name();
  return name == "Contiguous" || name == "Flatten" || name == "Reshape" || name == "Transpose";
}

// Returns what has the same value and, where that is cheap, is computed from the inputs once more, so that the array
// itself need not be kept.
inline array computed_again(const array& x) {
  if (!x.has_primitive()) {
    return x;
  }
  if (is_layout(x.primitive()) && x.inputs().size() == 1) {
    return array(x.shape(), x.dtype(), x.primitive_ptr(), {computed_again(x.inputs()[0])});
  }
  auto* kernel = dynamic_cast<Kernel*>(&x.primitive());
  if (!kernel || !kernel->is_cheap()) {
    return x;
  }
  std::vector<Shape> shapes;
  std::vector<mx::Dtype> dtypes;
  size_t place = 0;
  for (auto& output : x.outputs()) {
    place = output.id() == x.id() ? shapes.size() : place;
    shapes.push_back(output.shape()), dtypes.push_back(output.dtype());
  }
  return array::make_arrays(shapes, dtypes, x.primitive_ptr(), x.inputs())[place];
}

inline int64_t count_rows(const array& x) {
  return x.size() / x.shape(-1);
}

inline Shape with_last(Shape shape, int last) {
  shape.back() = last;
  return shape;
}

// The place of each gradient asked for among those that exist.
template <typename Gradient>
Arrays asked_for(const std::vector<int>& argnums, int first_frozen, Gradient gradient) {
  Arrays result;
  for (int argnum : argnums) {
    if (argnum >= first_frozen) {
      throw std::invalid_argument("This kernel has no gradient with respect to a weight.");
    }
    result.push_back(gradient(argnum));
  }
  return result;
}

// Where the rows of an array of heads [B, H, N, D] lie. Rows that overlap or whose numbers are not neighbours, as after
// a broadcast or a transpose, are copied.
struct Heads {
  std::vector<float> copy;
  float* data;
  int64_t batch_stride, head_stride, row_stride;

  explicit Heads(const array& x)
      : data(const_cast<float*>(x.data<float>())),
        batch_stride(x.strides(0)),
        head_stride(x.strides(1)),
        row_stride(x.strides(2)) {
    int64_t size = x.shape(3), step = x.strides(3);
    if ((step == 1 || size == 1) && row_stride >= size) {
      return;
    }
    copy.reserve(x.size());
    for (int64_t batch = 0; batch < x.shape(0); ++batch) {
      for (int64_t number = 0; number < x.shape(1); ++number) {
        for (int64_t row = 0; row < x.shape(2); ++row) {
          for (int64_t i = 0; i < size; ++i) {
            copy.push_back(head(batch, number)[row * row_stride + i * step]);
          }
        }
      }
    }
    data = copy.data();
    row_stride = size, head_stride = x.shape(2) * size, batch_stride = x.shape(1) * head_stride;
  }

  Heads(const Heads&) = delete;

  float* head(int64_t batch, int64_t number) const {
    return data + batch * batch_stride + number * head_stride;
  }
};

}  // namespace cpo
