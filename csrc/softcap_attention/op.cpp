// softcap_attention on stable tensors: checks, the plan, and the way to the two executors.
#include "op.h"

#include "launch.h"
#include "tensors.h"

namespace locfast::softcap_attention {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

template <class... Words>
void check(bool fits, const Words&... message) {
  STD_TORCH_CHECK(fits, "softcap_attention: ", message...);
}

// Rows are read 16 bytes at a time.
void check_rows(const char* name, const Tensor& tensor, const Tensor& like) {
  check(tensor.dim() == 4, name, " must be [B, H, T, D]");
  check(tensor.scalar_type() == like.scalar_type() && tensor.device() == like.device(), name,
        " must have the dtype and the device of q");
  bool aligned = tensor.stride(3) == 1 && reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
  for (int i = 0; i < 3; ++i) aligned &= tensor.size(i) <= 1 || tensor.stride(i) % 8 == 0;
  check(aligned, name, " must have a last stride of 1 and other strides and an address that are multiples of 16 bytes:",
        " call .contiguous()");
}

Shape check_shapes(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& key_mask) {
  check_rows("q", q, q);
  check_rows("k", k, q);
  check_rows("v", v, q);
  constexpr int64_t kMost = int64_t{1} << 30;
  for (int i = 0; i < 4; ++i) {
    check(k.size(i) == v.size(i) && (i == 2 || q.size(i) == k.size(i)),
          "q [B, H, Tq, D], k and v [B, H, Tk, D] do not fit at dimension ", i, ": ", q.size(i), ", ", k.size(i),
          " and ", v.size(i));
  }
  for (const Tensor* tensor : {&q, &k, &v}) {
    for (int i = 0; i < 3; ++i) check(tensor->size(i) < kMost, "dimension ", i, " is too large: ", tensor->size(i));
    check(tensor->size(2) <= 1 || std::abs(tensor->stride(2)) < kMost, "rows are too far apart");
  }
  check(q.size(3) % 8 == 0 && width_of(q.size(3)) > 0, "head dim ", q.size(3), ": 8, 16, ... 128 expected");
  if (key_mask.has_value()) {
    check(key_mask->dim() == 2 && key_mask->size(0) == k.size(0) && key_mask->size(1) == k.size(2),
          "key_mask must be [B, Tk]");
    check(key_mask->scalar_type() == ScalarType::Bool && key_mask->device() == q.device(),
          "key_mask must be bool, on the device of q");
  }
  const auto size = [](const Tensor& tensor, int i) { return static_cast<int>(tensor.size(i)); };
  return {size(q, 0), size(q, 1), size(q, 2), size(k, 2), size(q, 3)};
}

Cap check_cap(std::optional<double> softcap, double scale) {
  check(!softcap.has_value() || (*softcap > 0.0 && *softcap < INFINITY),
        "softcap must be positive and finite, or None");
  return make_cap(softcap.has_value(), softcap.value_or(0.0), scale);
}

Mask mask_of(const std::optional<Tensor>& key_mask) {
  if (!key_mask.has_value()) return {};
  return {static_cast<const bool*>(key_mask->data_ptr()), key_mask->stride(0), static_cast<int>(key_mask->stride(1))};
}

template <typename T>
Tensor4<T> elements(const Tensor& tensor) {
  return {static_cast<T*>(tensor.data_ptr()), tensor.stride(0), tensor.stride(1), static_cast<int>(tensor.stride(2))};
}

// Uninitialised [B, H, T, D], laid out as [B, T, H, D].
Tensor empty_like_rows(const Tensor& like) {
  return torch::stable::transpose(
      torch::stable::new_empty(like, {like.size(0), like.size(2), like.size(1), like.size(3)}), 1, 2);
}

void check_error(const char* error) { check(error == nullptr, error == nullptr ? "" : error); }

Limits limits_of(const Tensor& tensor, int64_t shared_bytes) {
  Limits limits = kHopper;
  if (tensor.is_cuda()) check_error(cuda::find_limits(limits));
  if (shared_bytes > 0) limits.block_bytes = std::min(limits.block_bytes, shared_bytes);
  return limits;
}

void check_plan(const Walk& walk, const Limits& limits) {
  check(walk.blocks <= 2147483647, "more heads than a grid takes: ", walk.blocks, " blocks");
  check(walk.blocks >= 0, "a block has ", limits.block_bytes, " bytes of shared memory, which is too little");
}

// On the device of `tensor`, body(element type as a null pointer, run); run(arguments, options...) runs one kernel.
template <class Body>
void execute(const Tensor& tensor, Body body) {
  const auto with_type = [&](auto run) {
    if (tensor.scalar_type() == ScalarType::BFloat16) return body(static_cast<BFloat16*>(nullptr), run);
    check(tensor.scalar_type() == ScalarType::Half, "bfloat16 or float16 expected");
    return body(static_cast<Half*>(nullptr), run);
  };
  if (tensor.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(tensor.get_device_index());
    void* stream = current_stream(tensor, "softcap_attention");
    with_type([&](const auto& arguments, auto... options) {
      if (arguments.walk.blocks > 0) check_error(cuda::run(arguments, options..., stream));
    });
  } else {
    with_type([](const auto& arguments, auto... options) {
      if (arguments.walk.blocks > 0) cpu::run(arguments, options...);
    });
  }
}

}  // namespace

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> softcap,
                                   double scale, const std::optional<Tensor>& key_mask, int64_t shared_bytes) {
  const Shape shape = check_shapes(q, k, v, key_mask);
  const Cap cap = check_cap(softcap, scale);
  Tensor out = empty_like_rows(q);
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  execute(q, [&](auto* type, auto run) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Limits limits = limits_of(q, shared_bytes);
    const Walk walk = plan_queries(shape, width_of(shape.head_dim), limits);
    check_plan(walk, limits);
    const bool bounded = std::is_same_v<T, BFloat16> && cap.capped && *softcap <= kLargestBoundedCap;
    run(ForwardArguments<T>{elements<const T>(q), elements<const T>(k), elements<const T>(v), mask_of(key_mask),
                            elements<T>(out), static_cast<float*>(lse.data_ptr()), shape, walk, cap},
        bounded ? Softmax::kBounded : Softmax::kOnline);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& out, const Tensor& lse, std::optional<double> softcap,
                                            double scale, const std::optional<Tensor>& key_mask, int64_t shared_bytes) {
  const Shape shape = check_shapes(q, k, v, key_mask);
  Cap cap = check_cap(softcap, scale);
  // The weight of a single key is 1 whatever its score: no gradient, not even the noise of two roundings.
  if (shape.keys == 1) cap.scale = 0.0f;
  check_rows("grad", grad, q);
  check_rows("out", out, q);
  for (int i = 0; i < 4; ++i) {
    check(grad.size(i) == q.size(i) && out.size(i) == q.size(i), "grad and out must have the shape of q");
    if (i < 3) check(lse.dim() == 3 && lse.size(i) == q.size(i), "lse must be [B, H, Tq]");
  }
  check(lse.scalar_type() == ScalarType::Float && lse.is_contiguous() && lse.device() == q.device(),
        "contiguous fp32 lse expected, on the device of q");

  Tensor q_grad = empty_like_rows(q), k_grad = empty_like_rows(k), v_grad = empty_like_rows(k);
  execute(q, [&](auto* type, auto run) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Limits limits = limits_of(q, shared_bytes);
    const int width = width_of(shape.head_dim);
    BackwardArguments<T> arguments{elements<const T>(grad), elements<const T>(q), elements<const T>(k),
                                   elements<const T>(v), elements<const T>(out),
                                   static_cast<const float*>(lse.data_ptr()), mask_of(key_mask), elements<T>(q_grad),
                                   elements<T>(k_grad), elements<T>(v_grad), nullptr, shape, {}, cap};
    Tensor delta = torch::stable::new_empty(lse, {q.size(0), q.size(1), q.size(2)});
    arguments.delta = static_cast<float*>(delta.data_ptr());
    arguments.walk = plan_queries(shape, width, limits);
    check_plan(arguments.walk, limits);
    run(arguments, BackwardKernel::kQueries);
    arguments.walk = plan_keys(shape, width, limits);
    check_plan(arguments.walk, limits);
    run(arguments, BackwardKernel::kKeys);
  });
  return {q_grad, k_grad, v_grad};
}

}  // namespace locfast::softcap_attention
