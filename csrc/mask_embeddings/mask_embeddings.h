// Masking of patch embeddings: the arithmetic of one element, shared by CUDA and CPU, and the CUDA launchers. The op
// select_views is the same kernels with rows of positions that stand in hidden places and are not added to visible ones.
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
  bool added;  // Whether positions are added to visible patches too.
  LOCFAST_HOST_DEVICE int64_t tokens() const { return prefix + patches; }
};

// One output element: a hidden patch is selected away rather than multiplied by zero, so a NaN in it cannot leak.
template <typename T>
LOCFAST_HOST_DEVICE T embed(T x, bool visible, float position, bool added) {
  if (!added) return visible ? x : static_cast<T>(position);
  return static_cast<T>((visible ? static_cast<float>(x) : 0.0f) + position);
}

// What one element of the output's gradient adds to the gradients of its patch and of its position.
template <typename T>
LOCFAST_HOST_DEVICE void add_gradient(T grad, bool visible, float& x_grad, float& position_grad, bool added) {
  const float value = static_cast<float>(grad);
  position_grad += added || !visible ? value : 0.0f;
  x_grad += visible ? value : 0.0f;
}

// The position gradient is a sum over images and views. It is cut into this many rows: row r takes images r, r + rows,
// ... in order, and then the rows are added in order: the same bits on every run and on both devices. On a GPU a row is
// a warp of one block, so the sum needs neither scratch memory nor a second kernel. Eight are enough where tokens times
// width is large; more give a large GPU (132 multiprocessors) 1024 threads each.
inline int64_t batch_rows(const Shape& shape) {
  constexpr int64_t kWantedThreads = 132 * 1024, kMostRows = 16;
  const int64_t threads_per_row = std::max<int64_t>(1, shape.tokens() * ((shape.width + 7) / 8));
  int64_t rows = 8;
  while (rows < kMostRows && rows * threads_per_row < kWantedThreads) rows *= 2;
  return std::min(rows, shape.batch);
}

// Launchers (cuda.cu): contiguous tensors on the current device; T is float, Half or BFloat16. They return an error
// message, or nullptr. images: how many a thread loads before it uses the first, 1 or 2.
template <typename T>
const char* launch_forward(
    const T* x, const bool* visible, const float* position, T* out, const Shape& shape, int images, void* stream);

// rows: at most 16.
template <typename T>
const char* launch_backward(
    const T* grad, const bool* visible, T* x_grad, float* position_grad, const Shape& shape, int rows, int images,
    void* stream);

}  // namespace locfast::mask_embeddings
