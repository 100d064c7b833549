// What every op does with stable tensors on their way to a kernel: their element type, their data, their stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

// It exists only where torch has CUDA; weak, so that the library loads in a CPU-only torch too.
#pragma weak aoti_torch_get_current_cuda_stream

namespace locfast {

// The stream on which PyTorch queues work for the device of `tensor`; `op` names whose error it is if there is none.
inline void* current_stream(const torch::stable::Tensor& tensor, const char* op) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, op, ": this torch has no CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

// Calls `body` with a null pointer of the element type `type`: float32, float16 or bfloat16.
template <typename Body>
void dispatch(torch::headeronly::ScalarType type, const char* op, Body&& body) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Float:
      return body(static_cast<float*>(nullptr));
    case ScalarType::Half:
      return body(static_cast<torch::headeronly::Half*>(nullptr));
    case ScalarType::BFloat16:
      return body(static_cast<torch::headeronly::BFloat16*>(nullptr));
    default:
      STD_TORCH_CHECK(false, op, ": float32, float16 or bfloat16 expected");
  }
}

template <typename T>
const T* read(const torch::stable::Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

template <typename T>
T* write(torch::stable::Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

}  // namespace locfast
