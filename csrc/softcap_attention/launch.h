// The two executors: each runs a kernel's body over the blocks of its walk. T is Half or BFloat16.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>
#include <utility>

#include "backward_one_pass.h"
#include "forward.h"
#include "plan.h"

namespace locfast::softcap_attention {

enum class BackwardKernel { kOnePass, kQueries, kKeys };

// cuda_forward.cu, cuda_backward.cu: the current device, an error message or nullptr.
namespace cuda {
const char* find_limits(Limits& limits);
template <typename T>
const char* run(const ForwardArguments<T>& arguments, Softmax softmax, Tanh tanh, void* stream);
template <typename T>
const char* run(const BackwardArguments<T>& arguments, BackwardKernel kernel, void* stream);
}  // namespace cuda

// cpu_forward.cpp, cpu_backward.cpp.
namespace cpu {
template <typename T>
void run(const ForwardArguments<T>& arguments, Softmax softmax, Tanh tanh);
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

// What forward kernels there are: fp16 has a running maximum and an accurate tanh; bf16 has the hardware's tanh, and,
// where the cap bounds the logits and heads are narrow, a polynomial to choose.
template <typename T, int kD, class Body>
auto with_arithmetic(Softmax softmax, Tanh tanh, Body body) {
  using Bounded = std::integral_constant<Softmax, Softmax::kBounded>;
  using Online = std::integral_constant<Softmax, Softmax::kOnline>;
  if constexpr (std::is_same_v<T, torch::headeronly::Half>) {
    return body(Online{}, std::integral_constant<Tanh, Tanh::kAccurate>{});
  } else {
    using Hardware = std::integral_constant<Tanh, Tanh::kHardware>;
    if (softmax == Softmax::kOnline) return body(Online{}, Hardware{});
    if constexpr (kD <= kWidestPolynomial) {
      if (tanh == Tanh::kPolynomial) return body(Bounded{}, std::integral_constant<Tanh, Tanh::kPolynomial>{});
    }
    return body(Bounded{}, Hardware{});
  }
}

template <typename T>
constexpr Tanh kBackwardTanh = std::is_same_v<T, torch::headeronly::Half> ? Tanh::kAccurate : Tanh::kHardware;

}  // namespace locfast::softcap_attention
