// What a training pass consists of, as operations of MLX for a CPU: each is one pass over its arrays on all cores, and
// keeps for the backward pass no more than its inputs and a few numbers a row.
//
// All arrays are float32 unless a weight is stored otherwise. Results do not depend on timing: what is computed
// together follows from the shapes and the number of threads, and sums are added in a fixed order.

#include <string>

#include "activations.h"
#include "attention.h"
#include "head.h"
#include "linear.h"
#include "norm.h"
#include "rotation.h"

namespace cpo {

// How nanobind, with which MLX's Python module is built, lays out an instance.
struct Instance {
  int64_t references;
  void* type;
  int32_t offset;
  uint32_t state : 2;
  uint32_t direct : 1;
};

array& array_in(void* object) {
  auto* instance = static_cast<Instance*>(object);
  void* place = static_cast<char*>(object) + instance->offset;
  return *static_cast<array*>(instance->direct ? place : *static_cast<void**>(place));
}

std::string failure;

using Function = Arrays (*)(const Arrays&, const double*);
constexpr Function kFunctions[] = {linear, norm, rotation, attention, silu_gate, gelu, head};

}  // namespace cpo

using namespace cpo;

extern "C" {

// Whether products with bfloat16 weights are to use the processor's matrix unit, if there is one; returns whether they do.
bool cpo_use_tiles(bool wanted) {
  return has_tiles = wanted && request_tiles();
}

void cpo_start(int threads, void* product) {
  sgemm = reinterpret_cast<Sgemm>(product);
  cpo_use_tiles(true);
  if (!team || team->size() != threads) {
    team = new Team(threads);
  }
}

// Sets the arrays in ``outputs`` to what a function makes of those in ``inputs``; returns what went wrong, or null.
const char* cpo_call(
    int function, int input_count, void** inputs, int output_count, void** outputs, const double* numbers) {
  try {
    Arrays arrays;
    for (int i = 0; i < input_count; ++i) {
      arrays.push_back(array_in(inputs[i]));
    }
    Arrays results = kFunctions[function](arrays, numbers);
    for (int i = 0; i < output_count; ++i) {
      array_in(outputs[i]) = results[i];
    }
    return nullptr;
  } catch (const std::exception& error) {
    failure = error.what();
    return failure.c_str();
  }
}

// The size of an array in Python, which shows whether its layout is the expected one.
int64_t cpo_size(void* object) {
  return array_in(object).size();
}
}
