// The two executors: each runs a kernel's body over the blocks of its walk. T is Half or BFloat16.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>
#include <utility>

#include "backward_keys.h"
#include "forward.h"
#include "plan.h"

namespace locfast::softcap_attention {

enum class BackwardKernel { kQueries, kKeys };

// cuda_forward.cu, cuda_backward.cu: the current device, an error message or nullptr.
namespace cuda {
const char* find_limits(Limits& limits);
template <typename T>
const char* run(const ForwardArguments<T>& arguments, Softmax softmax, void* stream);
template <typename T>
const char* run(const BackwardArguments<T>& arguments, BackwardKernel kernel, void* stream);
}  // namespace cuda

// cpu_forward.cpp, cpu_backward.cpp.
namespace cpu {
template <typename T>
void run(const ForwardArguments<T>& arguments, Softmax softmax);
template <typename T>
void run(const BackwardArguments<T>& arguments, BackwardKernel kernel);
}  // namespace cpu

// Calls body with the width as a constant.
template <class Body>
auto with_width(int head_dim, Body body) {
  switch (width_of(head_dim)) {
    case 64:
      return body(std::integral_constant<int, 64>{});
    case 80:
      return body(std::integral_constant<int, 80>{});
    case 96:
      return body(std::integral_constant<int, 96>{});
    default:
      return body(std::integral_constant<int, 128>{});
  }
}

template <typename T>
constexpr Tanh kTanhOf = std::is_same_v<T, torch::headeronly::Half> ? Tanh::kAccurate : Tanh::kHardware;

// Calls body with the softmax as a constant; fp16 always has a running maximum.
template <typename T, class Body>
auto with_softmax(Softmax softmax, Body body) {
  if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
    if (softmax == Softmax::kBounded) return body(std::integral_constant<Softmax, Softmax::kBounded>{});
  }
  return body(std::integral_constant<Softmax, Softmax::kOnline>{});
}

}  // namespace locfast::softcap_attention
