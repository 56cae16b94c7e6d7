// __half as far as kernels convert from it and to it, rounding to nearest even.
#pragma once

#include "../math/float_bits.h"

struct __half {
  std::uint16_t bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline float __half2float(__half x) { return commrt::fp16_to_float(x.bits); }

// NaN becomes 0x7fff, as on a GPU.
inline __half __float2half_rn(float x) {
  if (x != x) return {0x7fff};
  return {commrt::float_to_fp16(x)};
}
