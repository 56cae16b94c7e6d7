// x = u G over GF(2), 32 bits a word.
#pragma once

#include "polar.h"
#include "tile.cuh"

namespace commrt::cuda {

__device__ __forceinline__ int own_lane() { return static_cast<int>(threadIdx.x) % kWarp; }

// Bytes of up to 32 bits as a word, and back. Collective.
__device__ __forceinline__ std::uint32_t pack_bits(const std::uint8_t* from, int n) {
  const int lane = own_lane();
  return __ballot_sync(kAllLanes, lane < n ? from[lane] & 1 : 0);
}
__device__ __forceinline__ void unpack_bits(std::uint32_t word, std::uint8_t* to, int n) {
  const int lane = own_lane();
  if (lane < n) to[lane] = static_cast<std::uint8_t>(word >> lane & 1);
}

// The first five steps. Zeros behind fewer bits leave them as they are.
__device__ __forceinline__ std::uint32_t transform_word(std::uint32_t word) {
  word ^= word >> 1 & 0x55555555u;
  word ^= word >> 2 & 0x33333333u;
  word ^= word >> 4 & 0x0f0f0f0fu;
  word ^= word >> 8 & 0x00ff00ffu;
  return word ^ word >> 16;
}

// The i-th left one of two halves, `half` apart, that a step adds.
__device__ __forceinline__ int left_of(int i, int half) { return i / half * (2 * half) + i % half; }

}  // namespace commrt::cuda
