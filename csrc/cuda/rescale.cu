#include "launch.cuh"
#include "rescale.cuh"

namespace commrt::cuda {

void rescale(const RescaleArgs& args, std::int64_t num_blocks, Queue queue) {
  if (num_blocks == 0) return;
  const auto blocks = static_cast<unsigned>((num_blocks + kThreads - 1) / kThreads);
  launch(&rescale_kernel<kThreads>, blocks, kThreads, 0, queue, args, num_blocks);
}

}  // namespace commrt::cuda
