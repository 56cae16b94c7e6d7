#include "dither.h"
#include "lmmse_combine.cuh"

namespace commrt::cuda {

void lmmse_combine(const LmmseCombineArgs& args, Queue queue) {
  constexpr int kThreads = 256;
  const std::int64_t eights = (args.numel + kPerLane - 1) / kPerLane;
  if (eights == 0) return;
  launch(&lmmse_combine_kernel<kThreads>, static_cast<unsigned>((eights + kThreads - 1) / kThreads),
         kThreads, 0, queue, args);
}

}  // namespace commrt::cuda
