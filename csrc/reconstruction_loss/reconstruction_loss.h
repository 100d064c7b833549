// Distances of reconstructions from targets: the arithmetic of one element and of one token, shared by CUDA and CPU, and
// the CUDA launchers.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define LOCFAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LOCFAST_HOST_DEVICE inline
#endif

namespace locfast::reconstruction_loss {

enum class Loss { mse, l1, cosine };

constexpr int kLanes = 32;
// Least norm of a cosine, as in torch.nn.functional.cosine_similarity.
constexpr float kEps = 1e-8f;

// Tokens [B, V, T] in order, and where their rows of `width` elements begin.
struct Walk {
  int64_t batch, views, tokens, width;
  LOCFAST_HOST_DEVICE int64_t rows() const { return batch * views * tokens; }
};
struct Strides {
  int64_t image, view, token;
};
// At most 2^30 tokens: 32 bits divide several times faster than 64.
LOCFAST_HOST_DEVICE int64_t offset(const Walk& walk, const Strides& strides, uint32_t row) {
  const uint32_t tokens = static_cast<uint32_t>(walk.tokens), views = static_cast<uint32_t>(walk.views);
  const uint32_t view = row / tokens;
  return view / views * strides.image + view % views * strides.view + row % tokens * strides.token;
}

// Elements of an access: 16 bytes of the narrower of two types.
template <typename P, typename Y>
constexpr int kPack = 16 / static_cast<int>(sizeof(P) < sizeof(Y) ? sizeof(P) : sizeof(Y));

// What one lane of 32 gathers of a token. A lane takes packs lane, lane + 32, ... in order, and then the lanes are added
// as a tree: the same order, and so the same bits, on both devices.
template <Loss loss>
struct Sums {
  float total = 0.0f, squares = 0.0f, target_squares = 0.0f;  // total: of distances; for cosine of products

  LOCFAST_HOST_DEVICE void add(float prediction, float target) {
    if constexpr (loss == Loss::mse) {
      total += (prediction - target) * (prediction - target);
    } else if constexpr (loss == Loss::l1) {
      total += fabsf(prediction - target);
    } else {
      total += prediction * target;
      squares += prediction * prediction;
      target_squares += target * target;
    }
  }
};

struct Distance {
  float distance, slope, share;  // the last two are for the gradient of cosine, slope * (share * prediction - target)
};

template <Loss loss>
LOCFAST_HOST_DEVICE Distance distance_of(const Sums<loss>& sums, int64_t width) {
  if constexpr (loss != Loss::cosine) return {sums.total / static_cast<float>(width), 0.0f, 0.0f};
  const float norm = sqrtf(sums.squares), target_norm = sqrtf(sums.target_squares);
  const float least = norm < kEps ? kEps : norm;  // and a NaN stays one
  const float slope = 1.0f / (least * (target_norm < kEps ? kEps : target_norm));
  // PyTorch's backward divides by the norm as it is, and takes no step where that is 0. The square of a rounded root
  // would cost a prediction near its target the last bits of a small gradient.
  const float share = norm == 0.0f ? 0.0f : sums.total / (norm < kEps ? least * norm : sums.squares);
  return {1.0f - sums.total * slope, slope, share};
}

// The gradient of one element. slope: the token's gradient over the width; for cosine times the token's own slope. The l1
// gradient of a NaN is 0, as in PyTorch.
template <Loss loss>
LOCFAST_HOST_DEVICE float gradient(float prediction, float target, float slope, float share) {
  if constexpr (loss == Loss::mse) return slope * (2.0f * (prediction - target));
  if constexpr (loss == Loss::l1) return slope * static_cast<float>((prediction > target) - (prediction < target));
  return slope * (share * prediction - target);
}

// Launchers (cuda.cu): rows contiguous, on the current device; P and Y are float, Half or BFloat16. slopes: [2, rows],
// for cosine. They return an error message, or nullptr.
template <typename P, typename Y>
const char* launch_forward(
    Loss loss, const P* prediction, const Strides& prediction_strides, const Y* target, const Strides& target_strides,
    const float* scale, float* distance, float* slopes, const Walk& walk, void* stream);

template <typename P, typename Y>
const char* launch_backward(
    Loss loss, const float* grad, const Strides& grad_strides, const P* prediction, const Strides& prediction_strides,
    const Y* target, const Strides& target_strides, const float* scale, const float* slopes, P* prediction_grad,
    const Walk& walk, void* stream);

// Calls `body` with the loss as a template argument.
template <typename Body>
auto with_loss(Loss loss, Body&& body) {
  if (loss == Loss::mse) return body.template operator()<Loss::mse>();
  if (loss == Loss::l1) return body.template operator()<Loss::l1>();
  return body.template operator()<Loss::cosine>();
}

}  // namespace locfast::reconstruction_loss
