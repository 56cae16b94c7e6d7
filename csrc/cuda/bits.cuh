// The bits of eight consecutive elements, from and to memory, as memory.cuh has their values.
#pragma once

#include "memory.cuh"

namespace commrt::cuda {

constexpr int kWordsPerVector = 4;

template <typename Word>
__device__ __forceinline__ void load_bits(const Word* from, int valid, Word (&bits)[kPerLane]) {
  constexpr int kEach = 16 / sizeof(Word), kPerWord = kEach / kWordsPerVector;
  if (valid == kPerLane && is_aligned(from, 16)) {
#pragma unroll
    for (int first = 0; first < kPerLane; first += kEach) {
      const uint4 vector = __ldcs(reinterpret_cast<const uint4*>(from + first));
      const std::uint32_t words[] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const std::uint32_t word = words[i / kPerWord];
        bits[first + i] = static_cast<Word>(word >> 16 * (i % kPerWord));
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) bits[i] = i < valid ? from[i] : Word{0};
}

template <typename Word>
__device__ __forceinline__ void store_bits(Word* to, int valid, const Word (&bits)[kPerLane]) {
  constexpr int kEach = 16 / sizeof(Word), kPerWord = kEach / kWordsPerVector;
  if (valid == kPerLane && is_aligned(to, 16)) {
#pragma unroll
    for (int first = 0; first < kPerLane; first += kEach) {
      std::uint32_t words[kWordsPerVector] = {};
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        words[i / kPerWord] |= std::uint32_t{bits[first + i]} << 16 * (i % kPerWord);
      }
      __stcs(reinterpret_cast<uint4*>(to + first),
             make_uint4(words[0], words[1], words[2], words[3]));
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (i < valid) to[i] = bits[i];
  }
}

}  // namespace commrt::cuda
