// Enough of CUDA to run the kernels of csrc/cuda on a CPU, in place of <cuda_runtime.h>.
//
// fiber.h, .cpp          a stack that can be left and entered again
// thread_block.h, .cpp   a block's threads, its barrier, its warps' collectives, its shared memory
// keywords.h             __global__, threadIdx, ...
// collectives.h          __syncthreads, __shfl_xor_sync, ...
// memory.h               vector loads and stores
// intrinsics.h, half.h   arithmetic
// launch.h               kernel<<<...>>>(...)
#pragma once

#include "keywords.h"
// After the keywords, which they use.
#include "collectives.h"
#include "half.h"
#include "intrinsics.h"
#include "launch.h"
#include "memory.h"
