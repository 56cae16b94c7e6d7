// x = u G over GF(2), a byte a bit.
#pragma once

#include <cstring>

#include "../polar.h"
#include "simd.h"

namespace commrt::COMMRT_ISA {

COMMRT_INLINE void add_bits(std::uint8_t* to, const std::uint8_t* from, int n) {
  for (int i = 0; i < n; ++i) to[i] ^= from[i];
}

// Eight bits a word: the first three steps are shifts of it.
COMMRT_INLINE void transform_words(std::uint8_t* bits, int n) {
  for (int i = 0; i < n; i += 8) {
    std::uint64_t word;
    std::memcpy(&word, bits + i, 8);
    word ^= word >> 8 & 0x00ff00ff00ff00ffu;
    word ^= word >> 16 & 0x0000ffff0000ffffu;
    word ^= word >> 32;
    std::memcpy(bits + i, &word, 8);
  }
}

COMMRT_INLINE void transform(std::uint8_t* bits, int n) {
  if (n >= 8) transform_words(bits, n);
  for (int half = n >= 8 ? 8 : 1; half < n; half *= 2) {
    for (int first = 0; first < n; first += 2 * half) {
      add_bits(bits + first, bits + first + half, half);
    }
  }
}

}  // namespace commrt::COMMRT_ISA
