// CUDA kernels of reconstruction_loss. Both are bound by memory: a warp owns a token, and a lane loads 16 bytes at a time
// of prediction and target, up to kInFlight of each before it uses the first.

#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "reconstruction_loss.h"

namespace locfast::reconstruction_loss {
namespace {

constexpr int kThreads = 256;
// Packs of 8 that a lane loads of both tensors before it uses them: widths up to 1024 in one go.
constexpr int kInFlight = 4;

template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T value[N];
};

// Calls body(channel, prediction[N], target[N]) for every pack of a lane, in order.
template <typename P, typename Y, int N, typename Body>
__device__ __forceinline__ void for_packs(const P* prediction, const Y* target, int64_t width, Body&& body) {
  const int lane = threadIdx.x % kLanes;
  for (int64_t first = lane * N; first < width; first += kInFlight * kLanes * N) {
    Pack<P, N> from[kInFlight];
    Pack<Y, N> to[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t channel = first + i * kLanes * N;
      if (channel >= width) break;
      from[i] = *reinterpret_cast<const Pack<P, N>*>(prediction + channel);
      to[i] = *reinterpret_cast<const Pack<Y, N>*>(target + channel);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t channel = first + i * kLanes * N;
      if (channel < width) body(channel, from[i].value, to[i].value);
    }
  }
}

__device__ __forceinline__ float sum_of_lanes(float value) {
#pragma unroll
  for (int apart = kLanes / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(0xffffffffu, value, apart);
  return value;
}

__device__ __forceinline__ uint32_t row_of_warp() { return blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes; }

template <Loss loss, typename P, typename Y, int N>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const P* __restrict__ prediction, Strides prediction_strides, const Y* __restrict__ target,
                   Strides target_strides, const float* __restrict__ scale, float* __restrict__ distance,
                   float* __restrict__ slopes, Walk walk) {
  const uint32_t row = row_of_warp();
  if (row >= walk.rows()) return;
  const float factor = *scale;
  Sums<loss> sums;
  for_packs<P, Y, N>(
      prediction + offset(walk, prediction_strides, row), target + offset(walk, target_strides, row), walk.width,
      [&](int64_t, const P* from, const Y* to) {
#pragma unroll
        for (int i = 0; i < N; ++i) sums.add(static_cast<float>(from[i]), static_cast<float>(to[i]) * factor);
      });
  sums.total = sum_of_lanes(sums.total);
  if constexpr (loss == Loss::cosine) {
    sums.squares = sum_of_lanes(sums.squares);
    sums.target_squares = sum_of_lanes(sums.target_squares);
  }
  if (threadIdx.x % kLanes != 0) return;
  const Distance found = distance_of(sums, walk.width);
  distance[row] = found.distance;
  if constexpr (loss == Loss::cosine) {
    slopes[row] = found.slope;
    slopes[walk.rows() + row] = found.share;
  }
}

template <Loss loss, typename P, typename Y, int N>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const float* __restrict__ grad, Strides grad_strides, const P* __restrict__ prediction,
                    Strides prediction_strides, const Y* __restrict__ target, Strides target_strides,
                    const float* __restrict__ scale, const float* __restrict__ slopes,
                    P* __restrict__ prediction_grad, Walk walk) {
  const uint32_t row = row_of_warp();
  if (row >= walk.rows()) return;
  const float factor = *scale;
  float slope = grad[offset(walk, grad_strides, row)], share = 0.0f;
  if constexpr (loss == Loss::cosine) {
    slope *= slopes[row];
    share = slopes[walk.rows() + row];
  } else {
    slope /= static_cast<float>(walk.width);
  }
  for_packs<P, Y, N>(
      prediction + offset(walk, prediction_strides, row), target + offset(walk, target_strides, row), walk.width,
      [&](int64_t channel, const P* from, const Y* to) {
        Pack<P, N> result;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float element = static_cast<float>(from[i]), goal = static_cast<float>(to[i]) * factor;
          result.value[i] = static_cast<P>(gradient<loss>(element, goal, slope, share));
        }
        *reinterpret_cast<Pack<P, N>*>(prediction_grad + row * walk.width + channel) = result;
      });
}

unsigned blocks_for(const Walk& walk) {
  constexpr int64_t kRows = kThreads / kLanes;
  return static_cast<unsigned>((walk.rows() + kRows - 1) / kRows);
}

const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// 16-byte accesses need every row to begin on a 16-byte boundary.
template <typename T>
bool aligned(const T* data, const Strides& strides) {
  constexpr int64_t kElements = 16 / sizeof(T);
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides.image % kElements == 0 &&
         strides.view % kElements == 0 && strides.token % kElements == 0;
}

}  // namespace

template <typename P, typename Y>
const char* launch_forward(
    Loss loss, const P* prediction, const Strides& prediction_strides, const Y* target, const Strides& target_strides,
    const float* scale, float* distance, float* slopes, const Walk& walk, void* stream) {
  const auto launch = [&](auto kernel) {
    kernel<<<blocks_for(walk), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        prediction, prediction_strides, target, target_strides, scale, distance, slopes, walk);
  };
  const bool packs = walk.width % kPack<P, Y> == 0 && aligned(prediction, prediction_strides) &&
                     aligned(target, target_strides);
  with_loss(loss, [&]<Loss kind>() {
    packs ? launch(forward_kernel<kind, P, Y, kPack<P, Y>>) : launch(forward_kernel<kind, P, Y, 1>);
  });
  return launch_error();
}

template <typename P, typename Y>
const char* launch_backward(
    Loss loss, const float* grad, const Strides& grad_strides, const P* prediction, const Strides& prediction_strides,
    const Y* target, const Strides& target_strides, const float* scale, const float* slopes, P* prediction_grad,
    const Walk& walk, void* stream) {
  const auto launch = [&](auto kernel) {
    kernel<<<blocks_for(walk), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        grad, grad_strides, prediction, prediction_strides, target, target_strides, scale, slopes, prediction_grad,
        walk);
  };
  const bool packs = walk.width % kPack<P, Y> == 0 && aligned(prediction, prediction_strides) &&
                     aligned(target, target_strides) && reinterpret_cast<uintptr_t>(prediction_grad) % 16 == 0;
  with_loss(loss, [&]<Loss kind>() {
    packs ? launch(backward_kernel<kind, P, Y, kPack<P, Y>>) : launch(backward_kernel<kind, P, Y, 1>);
  });
  return launch_error();
}

#define LOCFAST_INSTANTIATE(P, Y)                                                                                   \
  template const char* launch_forward<P, Y>(Loss, const P*, const Strides&, const Y*, const Strides&, const float*, \
                                            float*, float*, const Walk&, void*);                                   \
  template const char* launch_backward<P, Y>(Loss, const float*, const Strides&, const P*, const Strides&,         \
                                             const Y*, const Strides&, const float*, const float*, P*,             \
                                             const Walk&, void*);
#define LOCFAST_INSTANTIATE_ALL(P)                   \
  LOCFAST_INSTANTIATE(P, float)                      \
  LOCFAST_INSTANTIATE(P, torch::headeronly::Half)    \
  LOCFAST_INSTANTIATE(P, torch::headeronly::BFloat16)
LOCFAST_INSTANTIATE_ALL(float)
LOCFAST_INSTANTIATE_ALL(torch::headeronly::Half)
LOCFAST_INSTANTIATE_ALL(torch::headeronly::BFloat16)

}  // namespace locfast::reconstruction_loss
