// Masking of patch embeddings: the arithmetic of one element, shared by CUDA and CPU, and the CUDA launchers.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__CUDACC__)
#define LOCFAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LOCFAST_HOST_DEVICE inline
#endif

namespace locfast::mask_embeddings {

struct Shape {
  int64_t batch, views, patches, prefix, width;
  LOCFAST_HOST_DEVICE int64_t tokens() const { return prefix + patches; }
};

// One output element: a hidden patch is selected away rather than multiplied by zero, so a NaN in it cannot leak.
template <typename T>
LOCFAST_HOST_DEVICE T embed(T x, bool visible, float position) {
  return static_cast<T>((visible ? static_cast<float>(x) : 0.0f) + position);
}

// What one element of the output's gradient adds to the gradients of its patch and of its position.
template <typename T>
LOCFAST_HOST_DEVICE void add_gradient(T grad, bool visible, float& x_grad, float& position_grad) {
  const float value = static_cast<float>(grad);
  position_grad += value;
  x_grad += visible ? value : 0.0f;
}

// The position gradient is a sum over images and views. It is cut into this many parts along the batch, each summed in
// order and then added in order: the same bits on every run and on both devices. Chosen so that parts times tokens
// times width gives a large GPU (132 multiprocessors) several blocks of 256 threads each.
inline int64_t batch_parts(const Shape& shape) {
  constexpr int64_t kWantedThreads = 132 * 2048;
  const int64_t threads_per_part = shape.tokens() * ((shape.width + 7) / 8);
  const int64_t parts = (kWantedThreads + threads_per_part - 1) / threads_per_part;
  constexpr int64_t kMostBlocks = 65535;  // CUDA's limit on a grid's second axis
  return std::min({parts, shape.batch, kMostBlocks});
}

// Images in part `part`: [first_image(part), first_image(part + 1)).
LOCFAST_HOST_DEVICE int64_t first_image(int64_t part, int64_t parts, int64_t batch) { return part * batch / parts; }

// Launchers (cuda.cu): contiguous tensors on the current device; T is float, Half or BFloat16. They return an error
// message, or nullptr.
template <typename T>
const char* launch_forward(
    const T* x, const bool* visible, const float* position, T* out, const Shape& shape, void* stream);

// partial: [parts, tokens, width] scratch.
template <typename T>
const char* launch_backward(
    const T* grad, const bool* visible, T* x_grad, float* partial, float* position_grad, int64_t parts,
    const Shape& shape, void* stream);

}  // namespace locfast::mask_embeddings
