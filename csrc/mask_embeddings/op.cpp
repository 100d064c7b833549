// mask_embeddings on stable tensors: checks, the CPU loops, and the way to the CUDA launchers.
#include "op.h"

#include <type_traits>
#include <vector>

#include "mask_embeddings.h"
#include "tensors.h"

namespace locfast::mask_embeddings {
namespace {

using torch::headeronly::ScalarType;

constexpr const char* kOp = "mask_embeddings";

template <typename T>
void forward_on_cpu(const T* x, const bool* visible, const float* position, T* out, const Shape& shape) {
  torch::stable::parallel_for(0, shape.batch * shape.views, 1, [&](int64_t begin, int64_t end) {
    for (int64_t view = begin; view < end; ++view) {
      const int64_t image = view / shape.views;
      for (int64_t token = 0; token < shape.tokens(); ++token) {
        const int64_t patch = token - shape.prefix;
        const bool shown = patch >= 0 && visible[view * shape.patches + patch];
        const T* from = shown ? x + (image * shape.patches + patch) * shape.width : nullptr;
        T* to = out + (view * shape.tokens() + token) * shape.width;
        for (int64_t c = 0; c < shape.width; ++c) {
          to[c] = embed(from ? from[c] : T(0), shown, position[token * shape.width + c], shape.added);
        }
      }
    }
  });
}

template <typename T>
void backward_on_cpu(
    const T* grad, const bool* visible, T* x_grad, float* position_grad, int64_t rows, const Shape& shape) {
  torch::stable::parallel_for(0, shape.tokens(), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> patch_grad(shape.width), row_grads(rows * shape.width);
    for (int64_t token = begin; token < end; ++token) {
      const int64_t patch = token - shape.prefix;
      std::fill(row_grads.begin(), row_grads.end(), 0.0f);
      for (int64_t image = 0; image < shape.batch; ++image) {
        float* row_grad = row_grads.data() + image % rows * shape.width;
        std::fill(patch_grad.begin(), patch_grad.end(), 0.0f);
        for (int64_t view = image * shape.views; view < (image + 1) * shape.views; ++view) {
          const bool shown = patch >= 0 && visible[view * shape.patches + patch];
          const T* from = grad + (view * shape.tokens() + token) * shape.width;
          for (int64_t c = 0; c < shape.width; ++c) add_gradient(from[c], shown, patch_grad[c], row_grad[c], shape.added);
        }
        if (patch < 0) continue;
        T* to = x_grad + (image * shape.patches + patch) * shape.width;
        for (int64_t c = 0; c < shape.width; ++c) to[c] = static_cast<T>(patch_grad[c]);
      }
      float* total = position_grad + token * shape.width;
      std::fill(total, total + shape.width, 0.0f);
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t c = 0; c < shape.width; ++c) total[c] += row_grads[row * shape.width + c];
      }
    }
  });
}

void check(bool fits, const char* message) { STD_TORCH_CHECK(fits, kOp, ": ", message); }

void check_images(int64_t images) {
  check(images == 1 || images == 2, "images in flight must be 1 or 2");
}

void check_placement(const Tensor& values, const Tensor& visible) {
  check(values.is_contiguous() && visible.is_contiguous(), "contiguous tensors expected");
  check(visible.scalar_type() == ScalarType::Bool, "visible must be bool");
  check(visible.device() == values.device(), "tensors must be on one device");
}

}  // namespace

Tensor forward(const Tensor& x, const Tensor& visible, const Tensor& position, int64_t images, bool added) {
  check_images(images);
  check_placement(x, visible);
  check(x.dim() == 3 && visible.dim() == 3 && position.dim() == 2, "x [B, N, C], visible [B, V, N], position [T, C]");
  const Shape shape{x.size(0), visible.size(1), x.size(1), position.size(0) - x.size(1), x.size(2), added};
  check(visible.size(0) == shape.batch && visible.size(2) == shape.patches, "visible does not fit x");
  check(shape.prefix >= 0 && position.size(1) == shape.width, "position does not fit x");
  check(position.scalar_type() == ScalarType::Float && position.is_contiguous(), "contiguous fp32 position expected");
  check(position.device() == x.device(), "tensors must be on one device");

  Tensor out = torch::stable::new_empty(x, {shape.batch, shape.views, shape.tokens(), shape.width});
  if (out.numel() == 0) return out;
  dispatch(x.scalar_type(), kOp, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (!x.is_cuda()) {
      return forward_on_cpu(read<T>(x), read<bool>(visible), read<float>(position), write<T>(out), shape);
    }
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    const char* error = launch_forward(
        read<T>(x), read<bool>(visible), read<float>(position), write<T>(out), shape, static_cast<int>(images),
        current_stream(x, kOp));
    STD_TORCH_CHECK(error == nullptr, kOp, ": ", error);
  });
  return out;
}

std::tuple<Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& visible, int64_t num_prefix_tokens, int64_t rows, int64_t images, bool added) {
  check_images(images);
  check(rows >= 0 && rows <= 16, "at most 16 rows; 0 for the usual number");
  check_placement(grad, visible);
  check(grad.dim() == 4 && visible.dim() == 3, "grad [B, V, T, C], visible [B, V, N]");
  const Shape shape{grad.size(0), grad.size(1), visible.size(2), num_prefix_tokens, grad.size(3), added};
  check(visible.size(0) == shape.batch && visible.size(1) == shape.views, "visible does not fit grad");
  check(shape.prefix >= 0 && grad.size(2) == shape.tokens(), "grad must have P + N tokens");

  Tensor x_grad = torch::stable::new_empty(grad, {shape.batch, shape.patches, shape.width});
  Tensor position_grad = torch::stable::new_empty(grad, {shape.tokens(), shape.width}, ScalarType::Float);
  if (grad.numel() == 0) {
    torch::stable::zero_(x_grad);
    torch::stable::zero_(position_grad);
    return {x_grad, position_grad};
  }
  rows = rows == 0 ? batch_rows(shape) : rows;
  dispatch(grad.scalar_type(), kOp, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (!grad.is_cuda()) {
      return backward_on_cpu(
          read<T>(grad), read<bool>(visible), write<T>(x_grad), write<float>(position_grad), rows, shape);
    }
    const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
    const char* error = launch_backward(
        read<T>(grad), read<bool>(visible), write<T>(x_grad), write<float>(position_grad), shape,
        static_cast<int>(rows), static_cast<int>(images), current_stream(grad, kOp));
    STD_TORCH_CHECK(error == nullptr, kOp, ": ", error);
  });
  return {x_grad, position_grad};
}

}  // namespace locfast::mask_embeddings
