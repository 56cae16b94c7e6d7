#include "launch.cuh"
#include "patch_apply.cuh"

namespace commrt::cuda {

void patch_apply(const PatchApplyArgs& args, Queue queue) {
  const std::int64_t groups = patch_groups(args.numel);
  if (groups == 0) return;
  const auto blocks = static_cast<unsigned>((groups + kWarps - 1) / kWarps);
  with_element_size(args.element_size, [&]<int size>() {
    launch(&patch_apply_kernel<size>, blocks, kThreads, 0, queue, args);
  });
}

}  // namespace commrt::cuda
