// reconstruction_loss on torch tensors, for the registration.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>

namespace locfast::reconstruction_loss {

using torch::stable::Tensor;

// prediction, target [B, V, T, C] fp32, fp16 or bf16 with contiguous rows, scale [1] fp32, loss mse, l1 or cosine
//   ->  distances [B, V, T] fp32, slopes [2, B, V, T] fp32 for cosine, else [0].
std::tuple<Tensor, Tensor> forward(
    const Tensor& prediction, const Tensor& target, const Tensor& scale, const std::string& loss);

// grad [B, V, T, 1] fp32, the forward's inputs and slopes  ->  gradient of prediction [B, V, T, C] in its dtype.
Tensor backward(
    const Tensor& grad, const Tensor& prediction, const Tensor& target, const Tensor& scale, const Tensor& slopes,
    const std::string& loss);

}  // namespace locfast::reconstruction_loss
