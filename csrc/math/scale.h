// Scales of a block: bfloat16, zero or a normal number, or NaN for a block that is not finite.
//
// A code has at most 7 significant bits and a scale 8, so code * scale is exact in fp32: a fused and
// an unfused multiply-add give the same bits, on every device.
#pragma once

#include "float_bits.h"

namespace commrt {

constexpr std::uint16_t kScaleNaN = 0x7fc0;

COMMRT_HD int max_code(int bits) { return bits == 1 ? 1 : (1 << (bits - 1)) - 1; }

// The largest scale whose decoded maximum, max_code * scale, is still finite.
COMMRT_HD std::uint32_t max_scale_bits(int bits) {
  return float_to_bits(3.402823466e+38f / static_cast<float>(max_code(bits))) >> 16;
}

COMMRT_HD std::uint16_t clamp_scale(std::uint32_t scale_bits, int bits) {
  const std::uint32_t limit = max_scale_bits(bits);
  const std::uint32_t finite = scale_bits < limit ? scale_bits : limit;
  return static_cast<std::uint16_t>(finite < 0x0080u ? 0u : finite);
}

COMMRT_HD bool is_finite_magnitude(std::uint32_t abs_bits) { return abs_bits < 0x7f800000u; }

// absmax / max_code, rounded up so that no element exceeds the largest code.
COMMRT_HD std::uint16_t scale_from_absmax(std::uint32_t absmax_bits, int bits) {
  const float quotient = bits_to_float(absmax_bits) / static_cast<float>(max_code(bits));
  const std::uint16_t scale = clamp_scale((float_to_bits(quotient) + 0xffffu) >> 16, bits);
  return is_finite_magnitude(absmax_bits) ? scale : kScaleNaN;
}

// A level that is not the maximum (a mean of magnitudes), rounded to nearest even.
COMMRT_HD std::uint16_t scale_from_level(float level, int bits) {
  const std::uint32_t level_bits = float_to_bits(level);
  return clamp_scale((level_bits + 0x7fffu + ((level_bits >> 16) & 1u)) >> 16, bits);
}

// 1 / scale; zero, which makes every code zero, where the scale is zero.
COMMRT_HD float inverse_scale(std::uint16_t scale) {
  return scale == 0 ? 0.0f : 1.0f / bf16_to_float(scale);
}

// scale * ratio, rounded to nearest even, such that no code times it overflows.
COMMRT_HD std::uint16_t rescaled(std::uint16_t scale, float ratio, int bits) {
  const float largest = 3.38953139e+38f / static_cast<float>(1 << (bits - 1));
  const float product = bf16_to_float(scale) * ratio;
  const std::uint16_t rounded = float_to_bf16(product > largest ? largest : product);
  return rounded < 0x0080u ? std::uint16_t{0} : rounded;
}

}  // namespace commrt
