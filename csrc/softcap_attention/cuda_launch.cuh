// What both launchers need.
#pragma once

#include <cuda_runtime.h>

#include "block_device.cuh"
#include "launch.h"

namespace locfast::softcap_attention::cuda {

// As much shared memory as the device has, whatever this launch wants: another thread may be launching the same kernel.
inline cudaError_t allow_shared_memory(const void* kernel) {
  int device = 0, bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  return error;
}

template <class Arguments>
const char* launch(void (*kernel)(Arguments), const Arguments& arguments, void* stream) {
  const Walk& walk = arguments.walk;
  cudaError_t error = cudaSuccess;
  if (walk.shared_bytes > 48 * 1024) {  // more than a kernel gets unasked
    error = allow_shared_memory(reinterpret_cast<const void*>(kernel));
  }
  if (error == cudaSuccess) {
    kernel<<<static_cast<unsigned>(walk.blocks), walk.warps * kLanes, walk.shared_bytes,
             static_cast<cudaStream_t>(stream)>>>(arguments);
  }
  const cudaError_t last = cudaGetLastError();  // asked for in any case: else the next launch would find it
  if (error == cudaSuccess) error = last;
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace locfast::softcap_attention::cuda
