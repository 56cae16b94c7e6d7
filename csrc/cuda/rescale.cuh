// rescale: two bytes a block, so one thread a scale.
#pragma once

#include "tile.cuh"

namespace commrt::cuda {

template <int threads>
__global__ void __launch_bounds__(threads)
    rescale_kernel(RescaleArgs args, std::int64_t num_blocks) {
  const std::int64_t index = std::int64_t{blockIdx.x} * threads + threadIdx.x;
  if (index >= num_blocks) return;
  std::uint16_t* scale = args.scales + index;
  store_scale(scale, rescaled(load_scale(scale), *args.ratio, args.bits));
}

}  // namespace commrt::cuda
