// The backward on the CPU, block by block.
#include <torch/csrc/stable/ops.h>

#include <atomic>

#include "block_host.h"
#include "launch.h"

namespace locfast::softcap_attention::cpu {

template <typename T>
void run(const BackwardArguments<T>& arguments, BackwardKernel kernel) {
  std::atomic<const char*> fault = nullptr;
  with_width(arguments.shape.head_dim, [&](auto width) {
    torch::stable::parallel_for(0, arguments.walk.blocks, 1, [&](int64_t begin, int64_t end) {
      HostBlock block(arguments.walk.warps, arguments.walk.shared_bytes);
      for (int64_t index = begin; index < end; ++index) {
        block.start(static_cast<int>(index));
        switch (kernel) {
          case BackwardKernel::kQueries:
            backward_queries<T, width(), kTanhOf<T>>(block, arguments);
            break;
          case BackwardKernel::kKeys:
            backward_keys<T, width(), kTanhOf<T>>(block, arguments);
            break;
        }
      }
      if (block.fault() != nullptr) fault = block.fault();
    });
  });
  STD_TORCH_CHECK(fault == nullptr, "softcap_attention: ", fault.load());
}

template void run(const BackwardArguments<Half>&, BackwardKernel);
template void run(const BackwardArguments<BFloat16>&, BackwardKernel);

}  // namespace locfast::softcap_attention::cpu
