// The forward's CUDA kernels, and what the device can hold.
#include "cuda_launch.cuh"

namespace locfast::softcap_attention::cuda {
namespace {

template <typename T, int kD, Softmax kSoftmax>
__global__ void __launch_bounds__(kMostWarps * kLanes, 1)
    forward_kernel(const __grid_constant__ ForwardArguments<T> a) {
  DeviceBlock block;
  forward<T, kD, kSoftmax, kTanhOf<T>>(block, a);
}

}  // namespace

const char* find_limits(Limits& limits) {
  const auto ask = [](cudaDeviceAttr attribute, int& value) {
    int device = 0;
    const cudaError_t error = cudaGetDevice(&device);
    return error == cudaSuccess ? cudaDeviceGetAttribute(&value, attribute, device) : error;
  };
  int block = 0, multiprocessor = 0;
  for (const cudaError_t error : {ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, block),
                                  ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor, multiprocessor),
                                  ask(cudaDevAttrMultiProcessorCount, limits.multiprocessors)}) {
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  limits.block_bytes = block;
  limits.multiprocessor_bytes = multiprocessor;
  return nullptr;
}

template <typename T>
const char* run(const ForwardArguments<T>& arguments, Softmax softmax, void* stream) {
  return with_width(arguments.shape.head_dim, [&](auto width) {
    return with_softmax<T>(softmax, [&](auto softmax) {
      return launch(forward_kernel<T, width(), softmax()>, arguments, stream);
    });
  });
}

template const char* run(const ForwardArguments<Half>&, Softmax, void*);
template const char* run(const ForwardArguments<BFloat16>&, Softmax, void*);

}  // namespace locfast::softcap_attention::cuda
