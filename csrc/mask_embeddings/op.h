// mask_embeddings on torch tensors, for the registration.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace locfast::mask_embeddings {

using torch::stable::Tensor;

// x [B, N, C] fp32, fp16 or bf16, visible [B, V, N] bool, position [P + N, C] fp32  ->  [B, V, P + N, C] in x's dtype.
// images: how many a thread of a GPU loads before it uses the first, 1 or 2 (no result depends on it).
// added: whether positions are added to visible patches too; if not, this is select_views.
Tensor forward(const Tensor& x, const Tensor& visible, const Tensor& position, int64_t images, bool added);

// grad [B, V, P + N, C], visible [B, V, N]  ->  gradient of x [B, N, C] in grad's dtype, of position [P + N, C] fp32.
// rows: into how many the sum over images is cut, at most 16; 0 for what the shape asks for.
std::tuple<Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& visible, int64_t num_prefix_tokens, int64_t rows, int64_t images, bool added);

}  // namespace locfast::mask_embeddings
