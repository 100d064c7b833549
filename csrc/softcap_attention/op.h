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
// keys stream through shared memory. polynomial: tanh as a polynomial where a warp's logits are within the cap (bf16
// with a cap of 80 or less, head dims up to 80).
std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> softcap,
                                   double scale, const std::optional<Tensor>& key_mask, int64_t shared_bytes,
                                   bool polynomial);

// grad and out like q, lse as the forward gave it  ->  the gradients of q, k and v, laid out as out is. one_pass: one
// kernel in place of two; less accurate (see backward_one_pass.h), and an error where a head does not fit.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& out, const Tensor& lse, std::optional<double> softcap,
                                            double scale, const std::optional<Tensor>& key_mask, int64_t shared_bytes,
                                            bool one_pass);

}  // namespace locfast::softcap_attention
