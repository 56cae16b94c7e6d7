// polar_transform: a thread block a block of bits, as words in the shared memory.
#pragma once

#include "polar_bits.cuh"

namespace commrt::cuda {

template <int warps>
__global__ void __launch_bounds__(warps* kWarp) polar_transform_kernel(PolarTransformArgs args) {
  COMMRT_SHARED_FLOATS(shared);
  auto* words = reinterpret_cast<std::uint32_t*>(shared);
  const int num_words = (1 << args.log2_size) / kWarp;
  std::uint8_t* bits = args.bits + (std::int64_t{blockIdx.x} << args.log2_size);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int i = warp; i < num_words; i += warps) {
    const std::uint32_t word = transform_word(pack_bits(bits + i * kWarp, kWarp));
    if (own_lane() == 0) words[i] = word;
  }
  for (int half = 1; half < num_words; half *= 2) {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < num_words / 2; i += warps * kWarp) {
      words[left_of(i, half)] ^= words[left_of(i, half) + half];
    }
  }
  __syncthreads();
  for (int i = warp; i < num_words; i += warps) unpack_bits(words[i], bits + i * kWarp, kWarp);
}

}  // namespace commrt::cuda
