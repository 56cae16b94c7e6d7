// One element's way to a code; csrc/cpu/simd.h has the same for sixteen.
#pragma once

#include "scale.h"

namespace commrt {

// Nearest even for |x| < 2^22: the sum's last bit is worth one.
COMMRT_HD float round_even(float x) { return (x + 12582912.0f) - 12582912.0f; }

COMMRT_HD float floor_even(float x) {
  const float nearest = round_even(x);
  return nearest > x ? nearest - 1.0f : nearest;
}

COMMRT_HD float clamp_level(float x, float limit) {
  x = x < limit ? x : limit;
  return x > -limit ? x : -limit;
}

// value / scale, still to be rounded to nearest even.
//
// Scales from the maximum are rounded up, so rounding to nearest cannot exceed the largest code; only
// the other cases clamp.
template <int bits>
COMMRT_HD float to_level(float value, float inverse_scale) {
  if constexpr (bits == 1) return value < 0.0f ? -1.0f : 1.0f;
  const float level = value * inverse_scale;
  return bits == 2 ? clamp_level(level, 1.0f) : level;
}

// A level rounded by a uniform number.
template <int bits>
COMMRT_HD float round_stochastic(float level, float uniform) {
  level = clamp_level(level, static_cast<float>(max_code(bits)));
  const float below = floor_even(level);
  return below + (level - below > uniform ? 1.0f : 0.0f);
}

}  // namespace commrt
