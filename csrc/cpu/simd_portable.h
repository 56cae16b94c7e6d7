// The vector types of g++ and clang, for any processor; what the other two must equal. Lane by lane
// work is kept out of line: inlined everywhere it would take the compiler minutes.
#pragma once

#include <cstring>

#define COMMRT_UNROLL  // the compiler splits a vector into registers already

namespace commrt::COMMRT_ISA {

typedef float Vf __attribute__((vector_size(64)));
typedef std::uint32_t Vu __attribute__((vector_size(64)));
struct Group {
  Vf first, second;
};

#define COMMRT_EACH_LANE for (int i = 0; i < 16; ++i)
#define COMMRT_LANEWISE static __attribute__((noinline, unused))

COMMRT_INLINE Vf broadcast(float x) { return x - Vf{}; }
COMMRT_INLINE Vf add(Vf a, Vf b) { return a + b; }
COMMRT_INLINE Vf sub(Vf a, Vf b) { return a - b; }
COMMRT_INLINE Vf mul(Vf a, Vf b) { return a * b; }
COMMRT_INLINE Vf div(Vf a, Vf b) { return a / b; }
COMMRT_LANEWISE void sqrt_lanes(float* lane) {
  COMMRT_EACH_LANE lane[i] = __builtin_sqrtf(lane[i]);
}
COMMRT_INLINE Vf sqrt(Vf x) {
  float lane[16];
  std::memcpy(lane, &x, sizeof lane);
  sqrt_lanes(lane);
  std::memcpy(&x, lane, sizeof lane);
  return x;
}
COMMRT_INLINE Vf copy_sign(Vf magnitude, Vf sign) {
  Vu bits, sign_bits;
  std::memcpy(&bits, &magnitude, sizeof bits);
  std::memcpy(&sign_bits, &sign, sizeof sign_bits);
  bits |= sign_bits & 0x80000000u;
  std::memcpy(&magnitude, &bits, sizeof bits);
  return magnitude;
}
COMMRT_INLINE Vf exact_fma(Vf a, Vf b, Vf c) { return a * b + c; }
COMMRT_INLINE Vf exact_fnma(Vf a, Vf b, Vf c) { return c - a * b; }
COMMRT_INLINE Vf clamp(Vf x, float limit) {
  const Vf top = broadcast(limit);
  x = x < top ? x : top;
  return x > -top ? x : -top;
}
// Nearest even for |x| < 2^22: the sum's last bit is worth one.
COMMRT_INLINE Vf round_even(Vf x) { return (x + 12582912.0f) - 12582912.0f; }
// For |x| < 2^22.
COMMRT_INLINE Vf floor(Vf x) {
  const Vf nearest = round_even(x);
  return nearest > x ? nearest - 1.0f : nearest;
}
COMMRT_INLINE Vu abs_bits(Vf x) {
  Vu bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffffu;
}
COMMRT_INLINE Vf as_floats(Vu x) {
  Vf floats;
  std::memcpy(&floats, &x, sizeof floats);
  return floats;
}
COMMRT_INLINE Vu zero_words() { return Vu{}; }
COMMRT_INLINE Vu max_words(Vu a, Vu b) { return a > b ? a : b; }
// max(a, |b|) of finite numbers, a >= 0.
COMMRT_INLINE Vf max_magnitude(Vf a, Vf b) {
  return as_floats(max_words(abs_bits(a), abs_bits(b)));
}
COMMRT_INLINE float sum_lanes(Vf x) {
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  }
  return x[0];
}
COMMRT_INLINE std::uint32_t max_lanes(Vu x) {
  std::uint32_t most = 0;
  COMMRT_EACH_LANE most = x[i] > most ? x[i] : most;
  return most;
}
// value where x > threshold, else 0
COMMRT_INLINE Vf where_greater(Vf x, Vf threshold, Vf value) {
  return x > threshold ? value : Vf{};
}
// yes where a < b, else no
COMMRT_INLINE Vf where_less(Vf a, Vf b, Vf yes, Vf no) { return a < b ? yes : no; }
// +1 or -1: the sign of a 1-bit code
COMMRT_INLINE Vf sign_of(Vf x) { return x < Vf{} ? broadcast(-1.0f) : broadcast(1.0f); }

template <DType dtype>
COMMRT_LANEWISE void widen(const std::uint16_t* half, float* lane) {
  COMMRT_EACH_LANE lane[i] =
      dtype == DType::kBFloat16 ? bf16_to_float(half[i]) : fp16_to_float(half[i]);
}
template <DType dtype>
COMMRT_LANEWISE void narrow(const float* lane, std::uint16_t* half) {
  COMMRT_EACH_LANE half[i] =
      dtype == DType::kBFloat16 ? float_to_bf16(lane[i]) : float_to_fp16(lane[i]);
}
template <DType dtype>
COMMRT_INLINE Vf load(const void* from) {
  Vf r;
  if constexpr (dtype == DType::kFloat32) {
    std::memcpy(&r, from, sizeof r);
  } else {
    std::uint16_t half[16];
    float lane[16];
    std::memcpy(half, from, sizeof half);
    widen<dtype>(half, lane);
    std::memcpy(&r, lane, sizeof r);
  }
  return r;
}
template <DType dtype>
COMMRT_INLINE void store(void* to, Vf x) {
  if constexpr (dtype == DType::kFloat32) {
    std::memcpy(to, &x, sizeof x);
  } else {
    float lane[16];
    std::uint16_t half[16];
    std::memcpy(lane, &x, sizeof lane);
    narrow<dtype>(lane, half);
    std::memcpy(to, half, sizeof half);
  }
}
template <DType dtype>
COMMRT_INLINE void stream(void* to, Vf x) {
  store<dtype>(to, x);
}
COMMRT_INLINE void stream_fence() {}
COMMRT_INLINE void prefetch(const void* address) { __builtin_prefetch(address); }

// Where the code of element i (of 32) lies: see commrt/ops/format.py.
template <int bits>
COMMRT_INLINE int byte_of(int i) {
  return bits == 4 ? i % 16 : i * bits / 8;
}
template <int bits>
COMMRT_INLINE int shift_of(int i) {
  return bits == 4 ? i / 16 * 4 : i * bits % 8;
}
template <int bits>
COMMRT_LANEWISE void unpack(const std::uint8_t* from, float* lane) {
  for (int i = 0; i < 32; ++i) {
    const std::uint32_t byte = from[byte_of<bits>(i)];
    const auto top = static_cast<std::int32_t>(byte << (32 - bits - shift_of<bits>(i)));
    const auto code = static_cast<float>(top >> (32 - bits));
    lane[i] = bits == 1 ? 1.0f + 2.0f * code : code;  // a set bit arrives as -1
  }
}
template <int bits>
COMMRT_LANEWISE void pack(const float* lane, std::uint8_t* to) {
  constexpr std::uint32_t mask = (1u << bits) - 1;
  std::uint8_t bytes[4 * bits] = {};
  for (int i = 0; i < 32; ++i) {
    const auto code = static_cast<std::int32_t>(lane[i]);
    const std::uint32_t raw = bits == 1 ? code < 0 : static_cast<std::uint32_t>(code) & mask;
    bytes[byte_of<bits>(i)] |= static_cast<std::uint8_t>(raw << shift_of<bits>(i));
  }
  std::memcpy(to, bytes, sizeof bytes);
}
template <int bits>
COMMRT_INLINE Group load_codes(const std::uint8_t* from) {
  Group codes;
  float lane[32];
  unpack<bits>(from, lane);
  std::memcpy(&codes, lane, sizeof codes);
  return codes;
}
template <int bits>
COMMRT_INLINE void store_codes(std::uint8_t* to, Group codes) {
  const Group rounded = {round_even(codes.first), round_even(codes.second)};
  float lane[32];
  std::memcpy(lane, &rounded, sizeof lane);
  pack<bits>(lane, to);
}

COMMRT_LANEWISE void fill_uniform(float* out, int count, std::uint64_t seed, Stream stream,
                                  std::uint64_t index) {
  for (int i = 0; i < count; i += 4) {
    const Philox4 x = philox(seed, stream, (index + i) / 4);
    for (int k = 0; k < 4; ++k) out[i + k] = uniform_from_word(x.word[k]);
  }
}

#undef COMMRT_LANEWISE
#undef COMMRT_EACH_LANE

}  // namespace commrt::COMMRT_ISA
