// Soft-capped attention: what a kernel is told, and the arithmetic of one score. Shared by the GPU and the CPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

// Kernel bodies are written once, over a Block: nvcc compiles them for block_device.cuh, g++ for block_host.h.
#if defined(__CUDACC__)
#define LOCFAST_BODY __device__ __forceinline__
#define LOCFAST_BOTH __host__ __device__ __forceinline__
#define LOCFAST_UNROLL _Pragma("unroll")
#else
#define LOCFAST_BODY inline
#define LOCFAST_BOTH inline
#define LOCFAST_UNROLL
#endif

namespace locfast::softcap_attention {

constexpr int kLanes = 32;
constexpr int kMostWarps = 8;

template <typename T, int N>
struct Array {
  static constexpr int kSize = N;
  T value[N];
  LOCFAST_BODY T& operator[](int index) { return value[index]; }
  LOCFAST_BODY const T& operator[](int index) const { return value[index]; }
};

// A [B, H, T, D] tensor whose last stride is 1. Strides in elements; a batch may pass 2^31 of them, a row may not.
template <typename T>
struct Tensor4 {
  T* data;
  int64_t batch_stride, head_stride;
  int row_stride;
};

// The rows of one head. Absent rows (past the end, or keys that the mask hides) are never read: they count as zero.
template <typename T>
struct Rows {
  T* data;
  int stride, count;
  const bool* kept;  // nullptr: all
  int kept_stride;

  LOCFAST_BODY bool present(int row) const {
    return row < count && (kept == nullptr || kept[static_cast<int64_t>(row) * kept_stride]);
  }
  LOCFAST_BODY T* row(int row) const { return data + static_cast<int64_t>(row) * stride; }
};

struct Mask {
  const bool* data;  // [B, rows] or nullptr
  int64_t batch_stride;
  int key_stride;
};

// Cheap enough to be made again where they are needed; kept, the rows of eight tensors would fill 60 registers.
struct Head {
  int batch, head;

  template <typename T>
  LOCFAST_BODY Rows<T> rows(const Tensor4<T>& tensor, int count, const Mask& mask = {}) const {
    return {tensor.data + batch * tensor.batch_stride + head * tensor.head_stride, tensor.row_stride, count,
            mask.data == nullptr ? nullptr : mask.data + batch * mask.batch_stride, mask.key_stride};
  }
};

struct Shape {
  int batch, heads;
  int queries, keys, head_dim;

  LOCFAST_BODY Head head(int pair) const { return {pair / heads, pair % heads}; }
};

// How a launch walks: every warp owns strips of 16 rows, and columns pass by in shared memory, a chunk at a time.
struct Walk {
  int64_t blocks;      // batch x heads x splits; below 2^31
  int splits;          // blocks of a head: split i takes row tiles i, i + splits, ...
  int tiles;           // row tiles of a head; a tile is 16 rows for each warp
  int warps;
  int chunk, chunks;   // columns in shared memory at once (a multiple of 16), and how many chunks they make
  int64_t shared_bytes;
};

constexpr float kLog2E = 1.4426950408889634f;

// Logits in units of log 2: x * outer, with x = tanh(product * inner) under a cap and the product itself without.
struct Cap {
  bool capped;
  float inner, outer;
  float shift;      // subtracted from every logit (in units of log 2) where no running maximum is kept
  float curvature;  // 1 under a cap, where d(logit) / d(product * scale) = 1 - x^2; otherwise 0
  float scale;
};

// Largest cap with exp(s - c), c = min(cap, 87 - cap), inside fp32 for every |s| <= cap, and its sums over 8192 keys
// times values of 100 too.
constexpr float kLargestBoundedCap = 80.0f;

inline Cap make_cap(bool capped, double softcap, double scale) {
  Cap cap{};
  cap.capped = capped;
  cap.inner = static_cast<float>(capped ? scale / softcap : 1.0);
  cap.outer = static_cast<float>((capped ? softcap : scale) * 1.4426950408889634);
  cap.shift = static_cast<float>(capped ? std::min(softcap, 87.0 - softcap) * 1.4426950408889634 : 0.0);
  cap.curvature = capped ? 1.0f : 0.0f;
  cap.scale = static_cast<float>(scale);
  return cap;
}

enum class Softmax {
  kBounded,  // the cap bounds the logits: a constant takes the place of the running maximum
  kOnline,
};

enum class Tanh {
  kHardware,  // tanh.approx.f32: 11 bits, for bf16
  kAccurate,  // absolute and relative error 2e-7: fp16, where 11 bits would show
};

// Near zero x + x^3 P(x^2) (minimax on [0, 0.625], relative error 4e-9 before rounding), so that small logits keep
// their relative accuracy; further out 1 - 2 / (1 + e^2|x|), which rises to 1 and stays there.
template <class Math>
LOCFAST_BODY float accurate_tanh(float x) {
  const float size = fabsf(x), u = x * x;
  float sum = fmaf(u, -5.71702654e-3f, 2.06505712e-2f);
  sum = fmaf(u, sum, -5.37434928e-2f);
  sum = fmaf(u, sum, 0.133314908f);
  sum = fmaf(u, sum, -0.333332837f);
  const float near = fmaf(x * u, sum, x);
  const float far = fmaf(-2.0f, Math::reciprocal(1.0f + Math::exp2(2.0f * kLog2E * size)), 1.0f);
  return size < 0.625f ? near : copysignf(far, x);
}

}  // namespace locfast::softcap_attention
