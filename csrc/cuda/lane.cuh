// One element in the place of a CPU's vector, for what csrc/math has for both.
#pragma once

#include "../math/quantise.h"
#include "platform.cuh"

namespace commrt::cuda {

using V = float;
__device__ __forceinline__ V broadcast(float x) { return x; }
__device__ __forceinline__ V add(V a, V b) { return a + b; }
__device__ __forceinline__ V sub(V a, V b) { return a - b; }
__device__ __forceinline__ V mul(V a, V b) { return a * b; }
__device__ __forceinline__ V where_less(V a, V b, V yes, V no) { return a < b ? yes : no; }
__device__ __forceinline__ V where_equal(V a, V b, V yes, V no) { return a == b ? yes : no; }
__device__ __forceinline__ V magnitude(V x) {
  return bits_to_float(float_to_bits(x) & 0x7fffffffu);
}
// NaN stays NaN.
__device__ __forceinline__ V clamp_number(V x, float limit) {
  x = x > limit ? limit : x;
  return x < -limit ? -limit : x;
}

}  // namespace commrt::cuda
