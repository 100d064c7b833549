// CUDA kernels of mask_embeddings. Both are bound by memory: every thread owns one 16-byte column of one token and
// walks over images and views, so x, the gradient and the output cross the bus once and positions stay in registers.

#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "mask_embeddings.h"

namespace locfast::mask_embeddings {
namespace {

constexpr int kThreads = 256;

template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T value[N];
};

// x [B, N, C], visible [B, V, N], position [T, C]  ->  out [B, V, T, C]
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const T* __restrict__ x, const bool* __restrict__ visible, const float* __restrict__ position,
                   T* __restrict__ out, Shape shape) {
  const int64_t packs = shape.width / N;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= shape.tokens() * packs) return;
  const int64_t token = column / packs, channel = column % packs * N;
  const int64_t patch = token - shape.prefix;

  float place[N];
#pragma unroll
  for (int i = 0; i < N; ++i) place[i] = position[token * shape.width + channel + i];

  for (int64_t image = blockIdx.y; image < shape.batch; image += gridDim.y) {
    Pack<T, N> embedding{};
    if (patch >= 0) {
      embedding = *reinterpret_cast<const Pack<T, N>*>(x + (image * shape.patches + patch) * shape.width + channel);
    }
    for (int64_t view = image * shape.views; view < (image + 1) * shape.views; ++view) {
      const bool shown = patch >= 0 && visible[view * shape.patches + patch];
      Pack<T, N> result;
#pragma unroll
      for (int i = 0; i < N; ++i) result.value[i] = embed(embedding.value[i], shown, place[i]);
      *reinterpret_cast<Pack<T, N>*>(out + (view * shape.tokens() + token) * shape.width + channel) = result;
    }
  }
}

// grad [B, V, T, C], visible [B, V, N]  ->  x_grad [B, N, C], partial [parts, T, C]
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const T* __restrict__ grad, const bool* __restrict__ visible, T* __restrict__ x_grad,
                    float* __restrict__ partial, Shape shape) {
  const int64_t packs = shape.width / N;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= shape.tokens() * packs) return;
  const int64_t token = column / packs, channel = column % packs * N;
  const int64_t patch = token - shape.prefix;

  float position_grad[N] = {};
  const int64_t end = first_image(blockIdx.y + 1, gridDim.y, shape.batch);
  for (int64_t image = first_image(blockIdx.y, gridDim.y, shape.batch); image < end; ++image) {
    float patch_grad[N] = {};
    for (int64_t view = image * shape.views; view < (image + 1) * shape.views; ++view) {
      const bool shown = patch >= 0 && visible[view * shape.patches + patch];
      const Pack<T, N> from =
          *reinterpret_cast<const Pack<T, N>*>(grad + (view * shape.tokens() + token) * shape.width + channel);
#pragma unroll
      for (int i = 0; i < N; ++i) add_gradient(from.value[i], shown, patch_grad[i], position_grad[i]);
    }
    if (patch >= 0) {
      Pack<T, N> result;
#pragma unroll
      for (int i = 0; i < N; ++i) result.value[i] = static_cast<T>(patch_grad[i]);
      *reinterpret_cast<Pack<T, N>*>(x_grad + (image * shape.patches + patch) * shape.width + channel) = result;
    }
  }
  float* place = partial + (blockIdx.y * shape.tokens() + token) * shape.width + channel;
#pragma unroll
  for (int i = 0; i < N; ++i) place[i] = position_grad[i];
}

// partial [parts, M]  ->  total [M], added in the order of parts
__global__ void __launch_bounds__(kThreads)
    add_parts_kernel(const float* __restrict__ partial, float* __restrict__ total, int64_t parts, int64_t size) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= size) return;
  float sum = 0.0f;
  for (int64_t part = 0; part < parts; ++part) sum += partial[part * size + index];
  total[index] = sum;
}

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));

// 16-byte accesses need rows and base pointers on 16-byte boundaries.
template <typename T>
bool packs_fit(const Shape& shape, const void* first, const void* second) {
  return shape.width % kPack<T> == 0 && reinterpret_cast<uintptr_t>(first) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(second) % 16 == 0;
}

}  // namespace

template <typename T>
const char* launch_forward(
    const T* x, const bool* visible, const float* position, T* out, const Shape& shape, void* stream) {
  const auto launch = [&](auto kernel, int pack) {
    const dim3 grid(blocks_for(shape.tokens() * (shape.width / pack)), static_cast<unsigned>(batch_parts(shape)));
    kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(x, visible, position, out, shape);
  };
  if (packs_fit<T>(shape, x, out)) {
    launch(forward_kernel<T, kPack<T>>, kPack<T>);
  } else {
    launch(forward_kernel<T, 1>, 1);
  }
  return launch_error();
}

template <typename T>
const char* launch_backward(
    const T* grad, const bool* visible, T* x_grad, float* partial, float* position_grad, int64_t parts,
    const Shape& shape, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const auto launch = [&](auto kernel, int pack) {
    const dim3 grid(blocks_for(shape.tokens() * (shape.width / pack)), static_cast<unsigned>(parts));
    kernel<<<grid, kThreads, 0, cuda_stream>>>(grad, visible, x_grad, partial, shape);
  };
  if (packs_fit<T>(shape, grad, x_grad)) {
    launch(backward_kernel<T, kPack<T>>, kPack<T>);
  } else {
    launch(backward_kernel<T, 1>, 1);
  }
  if (const char* error = launch_error()) return error;
  const int64_t size = shape.tokens() * shape.width;
  add_parts_kernel<<<blocks_for(size), kThreads, 0, cuda_stream>>>(partial, position_grad, parts, size);
  return launch_error();
}

#define LOCFAST_INSTANTIATE(T)                                                                                    \
  template const char* launch_forward<T>(const T*, const bool*, const float*, T*, const Shape&, void*);           \
  template const char* launch_backward<T>(const T*, const bool*, T*, float*, float*, int64_t, const Shape&, void*);
LOCFAST_INSTANTIATE(float)
LOCFAST_INSTANTIATE(torch::headeronly::Half)
LOCFAST_INSTANTIATE(torch::headeronly::BFloat16)

}  // namespace locfast::mask_embeddings
