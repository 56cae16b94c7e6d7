// lmmse_combine: eight elements of every row a thread.
#pragma once

#include "../dither.h"
#include "memory.cuh"

namespace commrt::cuda {

template <int threads>
__global__ void __launch_bounds__(threads) lmmse_combine_kernel(LmmseCombineArgs args) {
  const std::int64_t element = (std::int64_t{blockIdx.x} * threads + threadIdx.x) * kPerLane;
  const std::int64_t left = args.numel - element;
  if (left <= 0) return;
  const int valid = static_cast<int>(left < kPerLane ? left : kPerLane);
  const float* row = args.stack + element;
  float sum[kPerLane] = {};
#pragma unroll 4
  for (int k = 0; k < args.count; ++k, row += args.stride) {
    const float weight = args.weights[k];
    float x[kPerLane];
    load_floats(row, valid, x);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sum[i] = fmaf(weight, x[i], sum[i]);
  }
  store_floats(args.out + element, valid, sum);
}

}  // namespace commrt::cuda
