// CUDA's words for where code runs and memory lies, for a compiler that has only one place.
#pragma once

#include "thread_block.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#define threadIdx (::commrt::shim::current_block->thread_index())
#define blockIdx (::commrt::shim::current_block->block_index())
#define blockDim (::commrt::shim::current_block->block_size())
#define gridDim (::commrt::shim::current_block->grid_size())

constexpr int warpSize = ::commrt::shim::kWarpSize;
