// Every compiled op: its schema and its kernels. Only the stable ABI of PyTorch, so one library serves every torch.
#include <torch/csrc/stable/library.h>

#include "mask_embeddings/op.h"
#include "reconstruction_loss/op.h"
#include "softcap_attention/op.h"

STABLE_TORCH_LIBRARY(locfast_C, library) {
  library.def("mask_embeddings(Tensor x, Tensor visible, Tensor position, int images=2, bool added=True) -> Tensor");
  library.def(
      "mask_embeddings_backward(Tensor grad, Tensor visible, int num_prefix_tokens, int rows=0, int images=1, "
      "bool added=True) -> (Tensor, Tensor)");
  library.def("reconstruction_loss(Tensor prediction, Tensor target, Tensor scale, str loss) -> (Tensor, Tensor)");
  library.def(
      "reconstruction_loss_backward(Tensor grad, Tensor prediction, Tensor target, Tensor scale, Tensor slopes, "
      "str loss) -> Tensor");
  library.def(
      "softcap_attention(Tensor q, Tensor k, Tensor v, float? softcap, float scale, Tensor? key_mask, "
      "int shared_bytes=0) -> (Tensor, Tensor)");
  library.def(
      "softcap_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float? softcap, "
      "float scale, Tensor? key_mask, int shared_bytes=0) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(locfast_C, CPU, library) {
  library.impl("mask_embeddings", TORCH_BOX(&locfast::mask_embeddings::forward));
  library.impl("mask_embeddings_backward", TORCH_BOX(&locfast::mask_embeddings::backward));
  library.impl("reconstruction_loss", TORCH_BOX(&locfast::reconstruction_loss::forward));
  library.impl("reconstruction_loss_backward", TORCH_BOX(&locfast::reconstruction_loss::backward));
  library.impl("softcap_attention", TORCH_BOX(&locfast::softcap_attention::forward));
  library.impl("softcap_attention_backward", TORCH_BOX(&locfast::softcap_attention::backward));
}

STABLE_TORCH_LIBRARY_IMPL(locfast_C, CUDA, library) {
  library.impl("mask_embeddings", TORCH_BOX(&locfast::mask_embeddings::forward));
  library.impl("mask_embeddings_backward", TORCH_BOX(&locfast::mask_embeddings::backward));
  library.impl("reconstruction_loss", TORCH_BOX(&locfast::reconstruction_loss::forward));
  library.impl("reconstruction_loss_backward", TORCH_BOX(&locfast::reconstruction_loss::backward));
  library.impl("softcap_attention", TORCH_BOX(&locfast::softcap_attention::forward));
  library.impl("softcap_attention_backward", TORCH_BOX(&locfast::softcap_attention::backward));
}
