// The backward's CUDA kernels.
#include "cuda_launch.cuh"

namespace locfast::softcap_attention::cuda {
namespace {

template <typename T, int kD>
__global__ void __launch_bounds__(kMostWarps * kLanes, 1)
    queries_kernel(const __grid_constant__ BackwardArguments<T> a) {
  DeviceBlock block;
  backward_queries<T, kD, kTanhOf<T>>(block, a);
}

template <typename T, int kD>
__global__ void __launch_bounds__(kMostWarps * kLanes, 1)
    keys_kernel(const __grid_constant__ BackwardArguments<T> a) {
  DeviceBlock block;
  backward_keys<T, kD, kTanhOf<T>>(block, a);
}

}  // namespace

template <typename T>
const char* run(const BackwardArguments<T>& arguments, BackwardKernel kernel, void* stream) {
  return with_width(arguments.shape.head_dim, [&](auto width) {
    switch (kernel) {
      case BackwardKernel::kQueries:
        return launch(queries_kernel<T, width()>, arguments, stream);
      default:
        return launch(keys_kernel<T, width()>, arguments, stream);
    }
  });
}

template const char* run(const BackwardArguments<Half>&, BackwardKernel, void*);
template const char* run(const BackwardArguments<BFloat16>&, BackwardKernel, void*);

}  // namespace locfast::softcap_attention::cuda
