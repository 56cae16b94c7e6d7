// x = u G over GF(2), a byte a bit.
#pragma once

#include "../polar.h"
#include "simd.h"

namespace commrt::COMMRT_ISA {

COMMRT_INLINE void transform(std::uint8_t* bits, int n) {
  for (int half = 1; half < n; half *= 2) {
    for (int first = 0; first < n; first += 2 * half) {
      std::uint8_t* left = bits + first;
      for (int i = 0; i < half; ++i) left[i] ^= left[i + half];
    }
  }
}

}  // namespace commrt::COMMRT_ISA
