// coset_llr, coset_decode: an element a thread.
#pragma once

#include "../math/polar.h"
#include "platform.cuh"
#include "polar.h"

namespace commrt::cuda {

constexpr unsigned kCosetThreads = 256;

// The element of this thread, or one behind the last.
__device__ __forceinline__ std::int64_t own_element() {
  return std::int64_t{blockIdx.x} * kCosetThreads + threadIdx.x;
}

// A template, as all kernels are, so that a header may define it.
template <typename Args>
__global__ void __launch_bounds__(kCosetThreads) coset_llr_kernel(Args args) {
  const std::int64_t i = own_element();
  if (i >= args.numel) return;
  args.llr[i] = llr_in_coset(args.position[i], args.known[i], args.inverse_place, args.table,
                             args.table_size);
}

template <typename Args>
__global__ void __launch_bounds__(kCosetThreads) coset_decode_kernel(Args args) {
  const std::int64_t i = own_element();
  if (i >= args.numel) return;
  args.codes[i] =
      nearest_in_coset(args.position[i], args.residues[i], args.modulus, args.inverse_modulus);
}

}  // namespace commrt::cuda
