// reconstruction_loss on stable tensors: checks, the CPU loops, and the way to the CUDA launchers.
#include "op.h"

#include <type_traits>

#include "reconstruction_loss.h"
#include "tensors.h"

namespace locfast::reconstruction_loss {
namespace {

using torch::headeronly::ScalarType;

constexpr const char* kOp = "reconstruction_loss";

template <Loss loss, typename P, typename Y>
void forward_on_cpu(
    const P* prediction, const Strides& prediction_strides, const Y* target, const Strides& target_strides, float scale,
    float* distance, float* slopes, const Walk& walk) {
  const int pack = walk.width % kPack<P, Y> == 0 ? kPack<P, Y> : 1;
  torch::stable::parallel_for(0, walk.rows(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const P* from = prediction + offset(walk, prediction_strides, static_cast<uint32_t>(row));
      const Y* to = target + offset(walk, target_strides, static_cast<uint32_t>(row));
      Sums<loss> lanes[kLanes];
      for (int64_t c = 0; c < walk.width; ++c) {
        lanes[c / pack % kLanes].add(static_cast<float>(from[c]), static_cast<float>(to[c]) * scale);
      }
      for (int apart = kLanes / 2; apart > 0; apart /= 2) {
        for (int lane = 0; lane < apart; ++lane) {
          lanes[lane].total += lanes[lane + apart].total;
          lanes[lane].squares += lanes[lane + apart].squares;
          lanes[lane].target_squares += lanes[lane + apart].target_squares;
        }
      }
      const Distance found = distance_of(lanes[0], walk.width);
      distance[row] = found.distance;
      if constexpr (loss == Loss::cosine) {
        slopes[row] = found.slope;
        slopes[walk.rows() + row] = found.share;
      }
    }
  });
}

template <Loss loss, typename P, typename Y>
void backward_on_cpu(
    const float* grad, const Strides& grad_strides, const P* prediction, const Strides& prediction_strides,
    const Y* target, const Strides& target_strides, float scale, const float* slopes, P* prediction_grad,
    const Walk& walk) {
  torch::stable::parallel_for(0, walk.rows(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const P* from = prediction + offset(walk, prediction_strides, static_cast<uint32_t>(row));
      const Y* to = target + offset(walk, target_strides, static_cast<uint32_t>(row));
      const float of_token = grad[offset(walk, grad_strides, static_cast<uint32_t>(row))];
      float slope = of_token / static_cast<float>(walk.width), share = 0.0f;
      if constexpr (loss == Loss::cosine) {
        slope = of_token * slopes[row];
        share = slopes[walk.rows() + row];
      }
      P* result = prediction_grad + row * walk.width;
      for (int64_t c = 0; c < walk.width; ++c) {
        const float goal = static_cast<float>(to[c]) * scale;
        result[c] = static_cast<P>(gradient<loss>(static_cast<float>(from[c]), goal, slope, share));
      }
    }
  });
}

void check(bool fits, const char* message) { STD_TORCH_CHECK(fits, kOp, ": ", message); }

Loss loss_named(const std::string& name) {
  check(name == "mse" || name == "l1" || name == "cosine", "loss must be mse, l1 or cosine");
  return name == "mse" ? Loss::mse : name == "l1" ? Loss::l1 : Loss::cosine;
}

template <typename Body>
void dispatch(const Tensor& prediction, const Tensor& target, Body&& body) {
  locfast::dispatch(prediction.scalar_type(), kOp, [&](auto* first) {
    locfast::dispatch(target.scalar_type(), kOp, [&](auto* second) { body(first, second); });
  });
}

Walk check_inputs(const Tensor& prediction, const Tensor& target, const Tensor& scale) {
  check(prediction.dim() == 4 && target.dim() == 4, "prediction and target [B, V, T, C] expected");
  for (int axis = 0; axis < 4; ++axis) check(prediction.size(axis) == target.size(axis), "target does not fit");
  const Walk walk{prediction.size(0), prediction.size(1), prediction.size(2), prediction.size(3)};
  check(walk.rows() <= (int64_t{1} << 30), "at most 2^30 tokens at once");
  check(walk.width == 1 || (prediction.stride(3) == 1 && target.stride(3) == 1), "contiguous rows expected");
  check(scale.numel() == 1 && scale.scalar_type() == ScalarType::Float, "one fp32 scale expected");
  check(target.device() == prediction.device() && scale.device() == prediction.device(), "tensors on one device");
  return walk;
}

Strides strides(const Tensor& tensor) { return {tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

}  // namespace

std::tuple<Tensor, Tensor> forward(
    const Tensor& prediction, const Tensor& target, const Tensor& scale, const std::string& loss) {
  const Walk walk = check_inputs(prediction, target, scale);
  const Loss kind = loss_named(loss);
  Tensor distance =
      torch::stable::new_empty(prediction, {walk.batch, walk.views, walk.tokens}, ScalarType::Float);
  const int64_t kept = kind == Loss::cosine ? 2 * walk.rows() : 0;
  Tensor slopes = torch::stable::new_empty(prediction, {kept}, ScalarType::Float);
  if (walk.rows() == 0) return {distance, slopes};
  dispatch(prediction, target, [&](auto* first, auto* second) {
    using P = std::remove_pointer_t<decltype(first)>;
    using Y = std::remove_pointer_t<decltype(second)>;
    if (!prediction.is_cuda()) {
      with_loss(kind, [&]<Loss of>() {
        forward_on_cpu<of>(
            read<P>(prediction), strides(prediction), read<Y>(target), strides(target), *read<float>(scale),
            write<float>(distance), write<float>(slopes), walk);
      });
      return;
    }
    const torch::stable::accelerator::DeviceGuard guard(prediction.get_device_index());
    const char* error = launch_forward(
        kind, read<P>(prediction), strides(prediction), read<Y>(target), strides(target), read<float>(scale),
        write<float>(distance), write<float>(slopes), walk, current_stream(prediction, kOp));
    STD_TORCH_CHECK(error == nullptr, kOp, ": ", error);
  });
  return {distance, slopes};
}

Tensor backward(
    const Tensor& grad, const Tensor& prediction, const Tensor& target, const Tensor& scale, const Tensor& slopes,
    const std::string& loss) {
  const Walk walk = check_inputs(prediction, target, scale);
  const Loss kind = loss_named(loss);
  check(grad.dim() == 4 && grad.scalar_type() == ScalarType::Float, "grad [B, V, T, 1] fp32 expected");
  for (int axis = 0; axis < 3; ++axis) check(grad.size(axis) == prediction.size(axis), "grad does not fit");
  check(kind != Loss::cosine || slopes.numel() == 2 * walk.rows(), "slopes do not fit");
  check(slopes.is_contiguous() && slopes.scalar_type() == ScalarType::Float, "contiguous fp32 slopes expected");
  check(grad.device() == prediction.device() && slopes.device() == prediction.device(), "tensors on one device");

  Tensor prediction_grad = torch::stable::new_empty(prediction, {walk.batch, walk.views, walk.tokens, walk.width});
  if (prediction_grad.numel() == 0) return prediction_grad;
  dispatch(prediction, target, [&](auto* first, auto* second) {
    using P = std::remove_pointer_t<decltype(first)>;
    using Y = std::remove_pointer_t<decltype(second)>;
    if (!prediction.is_cuda()) {
      with_loss(kind, [&]<Loss of>() {
        backward_on_cpu<of>(
            read<float>(grad), strides(grad), read<P>(prediction), strides(prediction), read<Y>(target),
            strides(target), *read<float>(scale), read<float>(slopes), write<P>(prediction_grad), walk);
      });
      return;
    }
    const torch::stable::accelerator::DeviceGuard guard(prediction.get_device_index());
    const char* error = launch_backward(
        kind, read<float>(grad), strides(grad), read<P>(prediction), strides(prediction), read<Y>(target),
        strides(target), read<float>(scale), read<float>(slopes), write<P>(prediction_grad), walk,
        current_stream(prediction, kOp));
    STD_TORCH_CHECK(error == nullptr, kOp, ": ", error);
  });
  return prediction_grad;
}

}  // namespace locfast::reconstruction_loss
