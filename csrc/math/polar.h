// Elements of the polar ops; commrt/ops/reference/polar.py tells what they are. An LLR is
// log P(bit = 0) - log P(bit = 1), in nats.
#pragma once

#include <cmath>

#include "float_bits.h"

namespace commrt {

constexpr float kMostLlr = 1048576.0f;  // 2^20, so that sums of 2^16 are finite
constexpr int kCostLanes = 32;          // of a node's cost: every 32nd bit's, then pairwise

COMMRT_HD std::uint32_t sign_bit(bool is_set) { return std::uint32_t{is_set} << 31; }
COMMRT_HD std::uint32_t magnitude_bits(float x) { return float_to_bits(x) & 0x7fffffffu; }
COMMRT_HD float magnitude(float x) { return bits_to_float(magnitude_bits(x)); }

COMMRT_HD float clean_llr(float x) {
  x = x == x ? x : 0.0f;
  x = x < kMostLlr ? x : kMostLlr;
  return x > -kMostLlr ? x : -kMostLlr;
}

// log(1 + exp(-t)) for t >= 0, to 5e-4; zero from 8.5 on.
COMMRT_HD float soft_margin(float t) {
  const float s = t < 8.5f ? 8.5f - t : 0.0f;
  const float root = s * (0.152393f + s * (-0.0387703f + s * (0.0064587f + s * -0.000296612f)));
  const float square = root * root;
  return square * square;
}

// The LLR of the sum of two bits.
COMMRT_HD float boxplus(float a, float b) {
  const float size_a = magnitude(a), size_b = magnitude(b);
  const float least = size_a < size_b ? size_a : size_b;
  const float most = size_a < size_b ? size_b : size_a;
  const float size = least + (soft_margin(most + least) - soft_margin(most - least));
  const std::uint32_t sign = (float_to_bits(a) ^ float_to_bits(b)) & sign_bit(true);
  return bits_to_float(float_to_bits(size > 0.0f ? size : 0.0f) | sign);
}

// The LLR of a bit that is seen twice: by itself, and with another bit added to it.
COMMRT_HD float combine(float with_other, float itself, bool other) {
  return itself + bits_to_float(float_to_bits(with_other) ^ sign_bit(other));
}

// -log P(bit), in nats.
COMMRT_HD float bit_cost(float llr, bool bit) {
  const float against = bits_to_float(float_to_bits(llr) ^ sign_bit(!bit));
  return (against > 0.0f ? against : 0.0f) + soft_margin(magnitude(llr));
}

// Of the bit whose place is 1 / `inverse_place`, where the lower ones are known.
COMMRT_HD float llr_in_coset(float position, std::int16_t known, float inverse_place,
                             const float* table, int table_size) {
  const float places = (position - static_cast<float>(known)) * inverse_place;
  const float within = places - 2.0f * floorf(places * 0.5f);
  const bool is_finite = within == within;
  const float scaled = within * static_cast<float>(table_size / 2);
  const int index = static_cast<int>(is_finite ? scaled : 0.0f);
  const float llr = table[index < table_size ? index : table_size - 1];
  return is_finite ? llr : 0.0f;
}

COMMRT_HD std::int16_t nearest_in_coset(float position, std::int16_t residue, float modulus,
                                        float inverse_modulus) {
  const auto least = static_cast<float>(residue);
  float nearest = least + modulus * rintf((position - least) * inverse_modulus);
  nearest = nearest == nearest ? nearest : 0.0f;
  nearest = nearest < 32767.0f ? nearest : 32767.0f;
  return static_cast<std::int16_t>(nearest > -32768.0f ? nearest : -32768.0f);
}

}  // namespace commrt
