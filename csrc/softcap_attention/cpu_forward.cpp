// The forward on the CPU, block by block.
#include <torch/csrc/stable/ops.h>

#include <atomic>

#include "block_host.h"
#include "launch.h"

namespace locfast::softcap_attention::cpu {

template <typename T>
void run(const ForwardArguments<T>& arguments, Softmax softmax) {
  std::atomic<const char*> fault = nullptr;
  with_width(arguments.shape.head_dim, [&](auto width) {
    with_softmax<T>(softmax, [&](auto softmax) {
      torch::stable::parallel_for(0, arguments.walk.blocks, 1, [&](int64_t begin, int64_t end) {
        HostBlock block(arguments.walk.warps, arguments.walk.shared_bytes);
        for (int64_t index = begin; index < end; ++index) {
          block.start(static_cast<int>(index));
          forward<T, width(), softmax(), kTanhOf<T>>(block, arguments);
        }
        if (block.fault() != nullptr) fault = block.fault();
      });
    });
  });
  STD_TORCH_CHECK(fault == nullptr, "softcap_attention: ", fault.load());
}

template void run(const ForwardArguments<Half>&, Softmax);
template void run(const ForwardArguments<BFloat16>&, Softmax);

}  // namespace locfast::softcap_attention::cpu
