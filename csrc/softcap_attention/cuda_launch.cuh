// What both launchers need.
#pragma once

#include <cuda_runtime.h>

#include "block_device.cuh"
#include "launch.h"

namespace locfast::softcap_attention::cuda {

template <class Arguments>
const char* launch(void (*kernel)(Arguments), const Arguments& arguments, void* stream) {
  const Walk& walk = arguments.walk;
  cudaError_t error = cudaSuccess;
  if (walk.shared_bytes > 48 * 1024) {  // more than a kernel gets unasked
    error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(walk.shared_bytes));
  }
  if (error == cudaSuccess) {
    kernel<<<static_cast<unsigned>(walk.blocks), walk.warps * kLanes, walk.shared_bytes,
             static_cast<cudaStream_t>(stream)>>>(arguments);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace locfast::softcap_attention::cuda
