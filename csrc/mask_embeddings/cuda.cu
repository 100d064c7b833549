// CUDA kernels of mask_embeddings. Both are bound by memory: a thread owns one 16-byte column of one token and a few
// images, and loads all that it needs of them, views included, before it uses the first.

#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "mask_embeddings.h"

namespace locfast::mask_embeddings {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 32, kMostRows = 16;
// The published recipes' number of views, which the compiler unrolls; 0 stands for any other.
constexpr int kViews = 3;

template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T value[N];
};

template <int N, typename T>
__device__ __forceinline__ const Pack<T, N>& pack_at(const T* data) {
  return *reinterpret_cast<const Pack<T, N>*>(data);
}
// One store of 16 bytes, at L2, where L1 would write it through to: of a plain assignment the compiler makes four of 4
// bytes in the forward (nvcc 13.0).
template <int N, typename T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, N>& pack) {
  if constexpr (sizeof(pack) == sizeof(uint4)) {
    __stcg(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(&pack));
  } else {
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
  }
}

// x [B, N, C], visible [B, V, N], position [T, C]  ->  out [B, V, T, C]
template <typename T, int N, int Views, int Images>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const T* __restrict__ x, const bool* __restrict__ visible, const float* __restrict__ position,
                   T* __restrict__ out, Shape shape) {
  const int64_t packs = shape.width / N, views = Views ? Views : shape.views;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= shape.tokens() * packs) return;
  const int64_t token = column / packs, channel = column % packs * N;
  const int64_t patch = token - shape.prefix;
  const Pack<float, N> place = pack_at<N>(position + column * N);

  for (int64_t first = blockIdx.y * Images; first < shape.batch; first += gridDim.y * Images) {
    Pack<T, N> embedding[Images] = {};
    bool shown[Images][Views ? Views : 1];
#pragma unroll
    for (int i = 0; i < Images; ++i) {
      const int64_t image = first + i;
      if (patch < 0 || image >= shape.batch) continue;
      embedding[i] = pack_at<N>(x + (image * shape.patches + patch) * shape.width + channel);
#pragma unroll
      for (int v = 0; v < Views; ++v) shown[i][v] = visible[(image * views + v) * shape.patches + patch];
    }
#pragma unroll
    for (int i = 0; i < Images; ++i) {
      const int64_t image = first + i;
      if (image >= shape.batch) break;
#pragma unroll
      for (int v = 0; v < views; ++v) {
        const int64_t view = image * views + v;
        bool is_shown = false;
        if (patch >= 0) is_shown = Views ? shown[i][v % (Views ? Views : 1)] : visible[view * shape.patches + patch];
        Pack<T, N> result;
#pragma unroll
        for (int j = 0; j < N; ++j) result.value[j] = embed(embedding[i].value[j], is_shown, place.value[j], shape.added);
        store_pack<N>(out + view * shape.tokens() * shape.width + column * N, result);
      }
    }
  }
}

// grad [B, V, T, C], visible [B, V, N]  ->  x_grad [B, N, C], position_grad [T, C]. A warp of the block is a row.
template <typename T, int N, int Views, int Images>
__global__ void __launch_bounds__(kLanes * kMostRows)
    backward_kernel(const T* __restrict__ grad, const bool* __restrict__ visible, T* __restrict__ x_grad,
                    float* __restrict__ position_grad, Shape shape) {
  extern __shared__ float sums[];  // [rows, 32 * N]
  const int rows = blockDim.y, row = threadIdx.y;
  const int64_t packs = shape.width / N, views = Views ? Views : shape.views;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kLanes + threadIdx.x;
  const int64_t token = column / packs, channel = column % packs * N;
  const int64_t patch = token - shape.prefix;

  float total[N] = {};
  for (int64_t first = row; token < shape.tokens() && first < shape.batch; first += rows * Images) {
    Pack<T, N> from[Images][Views ? Views : 1];
    bool shown[Images][Views ? Views : 1] = {};
#pragma unroll
    for (int i = 0; i < Images; ++i) {
      const int64_t image = first + i * rows;
      if (image >= shape.batch) break;
#pragma unroll
      for (int v = 0; v < Views; ++v) {
        const int64_t view = image * views + v;
        from[i][v] = pack_at<N>(grad + view * shape.tokens() * shape.width + column * N);
        if (patch >= 0) shown[i][v] = visible[view * shape.patches + patch];
      }
    }
#pragma unroll
    for (int i = 0; i < Images; ++i) {
      const int64_t image = first + i * rows;
      if (image >= shape.batch) break;
      float patch_grad[N] = {};
#pragma unroll(Views ? Views : 4)
      for (int v = 0; v < views; ++v) {
        if constexpr (Views) {
#pragma unroll
          for (int j = 0; j < N; ++j) add_gradient(from[i][v].value[j], shown[i][v], patch_grad[j], total[j], shape.added);
        } else {
          const int64_t view = image * views + v;
          const Pack<T, N> one = pack_at<N>(grad + view * shape.tokens() * shape.width + column * N);
          const bool is_shown = patch >= 0 && visible[view * shape.patches + patch];
#pragma unroll
          for (int j = 0; j < N; ++j) add_gradient(one.value[j], is_shown, patch_grad[j], total[j], shape.added);
        }
      }
      if (patch < 0) continue;
      Pack<T, N> result;
#pragma unroll
      for (int j = 0; j < N; ++j) result.value[j] = static_cast<T>(patch_grad[j]);
      *reinterpret_cast<Pack<T, N>*>(x_grad + (image * shape.patches + patch) * shape.width + channel) = result;
    }
  }
#pragma unroll
  for (int j = 0; j < N; ++j) sums[(row * kLanes + threadIdx.x) * N + j] = total[j];
  __syncthreads();
  for (int i = row * kLanes + threadIdx.x; i < kLanes * N; i += rows * kLanes) {
    const int64_t place = static_cast<int64_t>(blockIdx.x) * kLanes * N + i;
    if (place >= shape.tokens() * shape.width) break;
    float sum = 0.0f;
    for (int r = 0; r < rows; ++r) sum += sums[r * kLanes * N + i];
    position_grad[place] = sum;
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));

// 16-byte accesses need rows and base pointers on 16-byte boundaries.
template <typename T>
bool packs_fit(const Shape& shape, const void* first, const void* second, const void* third) {
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  return shape.width % kPack<T> == 0 && aligned(first) && aligned(second) && aligned(third);
}

// Calls launch.operator()<N, Views, Images>().
template <typename T, typename Launch>
void with_form(const Shape& shape, int images, bool packs, Launch&& launch) {
  constexpr int kWide = kPack<T>;
  if (!packs) return launch.template operator()<1, 0, 1>();
  if (shape.views != kViews) return launch.template operator()<kWide, 0, 1>();
  if (images == 1) return launch.template operator()<kWide, kViews, 1>();
  return launch.template operator()<kWide, kViews, 2>();
}

}  // namespace

template <typename T>
const char* launch_forward(
    const T* x, const bool* visible, const float* position, T* out, const Shape& shape, int images, void* stream) {
  with_form<T>(shape, images, packs_fit<T>(shape, x, position, out), [&]<int N, int Views, int Images>() {
    constexpr int64_t kMostBlocks = 65535;  // CUDA's limit on a grid's second axis
    const int64_t columns = shape.tokens() * (shape.width / N);
    const dim3 grid(static_cast<unsigned>(ceil_div(columns, kThreads)),
                    static_cast<unsigned>(std::min(ceil_div(shape.batch, Images), kMostBlocks)));
    forward_kernel<T, N, Views, Images>
        <<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(x, visible, position, out, shape);
  });
  return launch_error();
}

template <typename T>
const char* launch_backward(
    const T* grad, const bool* visible, T* x_grad, float* position_grad, const Shape& shape, int rows, int images,
    void* stream) {
  with_form<T>(shape, images, packs_fit<T>(shape, grad, x_grad, nullptr), [&]<int N, int Views, int Images>() {
    const auto blocks = static_cast<unsigned>(ceil_div(shape.tokens() * (shape.width / N), kLanes));
    const dim3 threads(kLanes, static_cast<unsigned>(rows));
    const size_t shared = sizeof(float) * kLanes * N * rows;
    backward_kernel<T, N, Views, Images>
        <<<blocks, threads, shared, static_cast<cudaStream_t>(stream)>>>(grad, visible, x_grad, position_grad, shape);
  });
  return launch_error();
}

#define LOCFAST_INSTANTIATE(T)                                                                                       \
  template const char* launch_forward<T>(const T*, const bool*, const float*, T*, const Shape&, int, void*);         \
  template const char* launch_backward<T>(const T*, const bool*, T*, float*, const Shape&, int, int, void*);
LOCFAST_INSTANTIATE(float)
LOCFAST_INSTANTIATE(torch::headeronly::Half)
LOCFAST_INSTANTIATE(torch::headeronly::BFloat16)

}  // namespace locfast::mask_embeddings
