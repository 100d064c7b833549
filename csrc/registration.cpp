// Every compiled op: its schema and its kernels. Only the stable ABI of PyTorch, so one library serves every torch.
#include <torch/csrc/stable/library.h>

#include "mask_embeddings/op.h"

STABLE_TORCH_LIBRARY(locfast_C, library) {
  library.def("mask_embeddings(Tensor x, Tensor visible, Tensor position) -> Tensor");
  library.def("mask_embeddings_backward(Tensor grad, Tensor visible, int num_prefix_tokens) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(locfast_C, CPU, library) {
  library.impl("mask_embeddings", TORCH_BOX(&locfast::mask_embeddings::forward));
  library.impl("mask_embeddings_backward", TORCH_BOX(&locfast::mask_embeddings::backward));
}

STABLE_TORCH_LIBRARY_IMPL(locfast_C, CUDA, library) {
  library.impl("mask_embeddings", TORCH_BOX(&locfast::mask_embeddings::forward));
  library.impl("mask_embeddings_backward", TORCH_BOX(&locfast::mask_embeddings::backward));
}
