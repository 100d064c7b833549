// softcap_attention on torch tensors, for the registration.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace locfast::softcap_attention {

using torch::stable::Tensor;

// q [B, H, Tq, D], k and v [B, H, Tk, D] in bf16 or fp16, D a multiple of 8 up to 128, rows on 16-byte boundaries;
// key_mask [B, Tk] bool, True = kept  ->  out [B, H, Tq, D], a contiguous [B, Tq, H, D] seen transposed, and the
// natural log-sum-exp of the capped logits, lse [B, H, Tq] fp32, +inf for a row with no kept key.
// shared_bytes: the most shared memory that a block may take, below the device's own limit; 0: that limit. With less,
// keys stream through shared memory.
std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> softcap,
                                   double scale, const std::optional<Tensor>& key_mask, int64_t shared_bytes);

// grad and out like q, lse as the forward gave it  ->  the gradients of q, k and v, laid out as out is.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& out, const Tensor& lse, std::optional<double> softcap,
                                            double scale, const std::optional<Tensor>& key_mask, int64_t shared_bytes);

}  // namespace locfast::softcap_attention
