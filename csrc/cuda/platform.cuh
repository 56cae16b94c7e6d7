// CUDA as nvcc has it, or that of csrc/shim where a host compiler builds these kernels.
#pragma once

#include "ops.h"

#if defined(__CUDACC__)

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

// The dynamic shared memory of a block, as floats.
#define COMMRT_SHARED_FLOATS(name) extern __shared__ float name[]

namespace commrt::cuda {

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// Queue a kernel on the current device; what fails later, fails on the stream.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads,
            std::size_t shared_bytes, Queue queue, Arguments... arguments) {
  const auto stream = reinterpret_cast<cudaStream_t>(queue.stream);
  kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...);
  check(cudaGetLastError());
}

}  // namespace commrt::cuda

#else

#include "../shim/cuda.h"

#define COMMRT_SHARED_FLOATS(name) \
  float* name = static_cast<float*>(::commrt::shim::current_block->shared())

namespace commrt::cuda {

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads,
            std::size_t shared_bytes, Queue, Arguments... arguments) {
  shim::launch(kernel, blocks, threads, shared_bytes, arguments...);
}

}  // namespace commrt::cuda

#endif
