// One element of an optimizer's state to and from its bits; csrc/cpu/step.h has the same for sixteen.
#pragma once

#include "../step.h"
#include "quantise.h"

namespace commrt {

// Segments whose largest magnitude is below are stored as zeros, so that the inverse of a scale is
// finite.
constexpr float kLeastMagnitude = 1.2621774483536189e-29f;  // 2^-96
constexpr int kUnsignedBias = 128;

COMMRT_HD constexpr float top_code(MomentFormat format) {
  return format == MomentFormat::kFourth8 ? 255.0f : 127.0f;
}

// The largest magnitude in units of the scale.
COMMRT_HD constexpr float top_level(MomentFormat format) {
  const float top = top_code(format);
  return format == MomentFormat::kLinear8   ? top
         : format == MomentFormat::kSquare8 ? top * top
                                            : (top * top) * (top * top);
}

// What a segment's codes are multiplied by, and what its elements are; both 0 if it is stored as
// zeros, and a NaN if an element is not finite.
struct MomentScale {
  float scale, inverse;
};
COMMRT_HD MomentScale moment_scale(std::uint32_t absmax_bits, MomentFormat format) {
  if (absmax_bits >= 0x7f800000u) return {bits_to_float(0x7fc00000u), 0.0f};
  const float absmax = bits_to_float(absmax_bits);
  if (absmax < kLeastMagnitude) return {0.0f, 0.0f};
  return {absmax / top_level(format), top_level(format) / absmax};
}

// The weight that a bfloat16 number and its residual stand for, and the other way: fp32 without its
// last eight bits.
COMMRT_HD float join_weight(std::uint16_t high, std::int8_t low) {
  const std::uint32_t bits = (static_cast<std::uint32_t>(high) << 8) +
                             static_cast<std::uint32_t>(static_cast<std::int32_t>(low));
  return bits_to_float(bits << 8);
}
struct SplitWeight {
  std::uint16_t high;
  std::int8_t low;
};
COMMRT_HD SplitWeight split_weight(float x) {
  const std::uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) >= 0x7f800000u) return {float_to_bf16(x), 0};
  const std::uint32_t rounded = (bits >> 8) + ((bits >> 7) & 1u);
  const std::uint32_t high = (rounded + 0x80u) >> 8;
  return {static_cast<std::uint16_t>(high),
          static_cast<std::int8_t>(static_cast<std::int32_t>(rounded) -
                                   static_cast<std::int32_t>(high << 8))};
}

// One of the two bfloat16 neighbours, such that the expectation is x.
COMMRT_HD std::uint16_t round_weight(float x, float uniform) {
  const std::uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) >= 0x7f800000u) return float_to_bf16(x);
  const auto below_one = static_cast<std::uint32_t>(uniform * 65536.0f);
  return static_cast<std::uint16_t>((bits + below_one) >> 16);
}

}  // namespace commrt
