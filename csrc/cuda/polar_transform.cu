#include "polar_transform.cuh"

namespace commrt::cuda {

void polar_transform(const PolarTransformArgs& args, Queue queue) {
  if (args.num_blocks == 0) return;
  const std::size_t shared_bytes = std::size_t{1} << args.log2_size >> 3;
  launch(&polar_transform_kernel<kWarps>, static_cast<unsigned>(args.num_blocks), kThreads,
         shared_bytes, queue, args);
}

}  // namespace commrt::cuda
