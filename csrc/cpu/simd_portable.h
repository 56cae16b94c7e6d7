// Plain C++ lanes: what any compiler can vectorise, and what the others must equal.
#pragma once

#include <cmath>
#include <cstring>

namespace commrt::COMMRT_ISA {

struct Vf {
  float lane[16];
};
struct Vu {
  std::uint32_t lane[16];
};

#define COMMRT_EACH_LANE for (int i = 0; i < 16; ++i)

COMMRT_INLINE Vf broadcast(float x) {
  Vf r;
  COMMRT_EACH_LANE r.lane[i] = x;
  return r;
}
COMMRT_INLINE Vf add(Vf a, Vf b) {
  COMMRT_EACH_LANE a.lane[i] += b.lane[i];
  return a;
}
COMMRT_INLINE Vf sub(Vf a, Vf b) {
  COMMRT_EACH_LANE a.lane[i] -= b.lane[i];
  return a;
}
COMMRT_INLINE Vf mul(Vf a, Vf b) {
  COMMRT_EACH_LANE a.lane[i] *= b.lane[i];
  return a;
}
COMMRT_INLINE Vf exact_fma(Vf a, Vf b, Vf c) { return add(mul(a, b), c); }
COMMRT_INLINE Vf exact_fnma(Vf a, Vf b, Vf c) { return sub(c, mul(a, b)); }
COMMRT_INLINE Vf clamp(Vf x, float limit) {
  COMMRT_EACH_LANE {
    x.lane[i] = x.lane[i] < limit ? x.lane[i] : limit;
    x.lane[i] = x.lane[i] > -limit ? x.lane[i] : -limit;
  }
  return x;
}
// Nearest even for |x| < 2^22: the sum's last bit is worth one.
COMMRT_INLINE Vf round_even(Vf x) {
  COMMRT_EACH_LANE {
    const float shifted = x.lane[i] + 12582912.0f;
    x.lane[i] = shifted - 12582912.0f;
  }
  return x;
}
COMMRT_INLINE Vf floor(Vf x) {
  COMMRT_EACH_LANE x.lane[i] = std::floor(x.lane[i]);
  return x;
}
COMMRT_INLINE Vu abs_bits(Vf x) {
  Vu r;
  std::memcpy(&r, &x, sizeof r);
  COMMRT_EACH_LANE r.lane[i] &= 0x7fffffffu;
  return r;
}
COMMRT_INLINE Vf as_floats(Vu x) {
  Vf r;
  std::memcpy(&r, &x, sizeof r);
  return r;
}
COMMRT_INLINE Vu zero_words() { return Vu{}; }
COMMRT_INLINE Vu max_words(Vu a, Vu b) {
  COMMRT_EACH_LANE a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
  return a;
}
COMMRT_INLINE float sum_lanes(Vf x) {
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x.lane[i] += x.lane[i + width];
  }
  return x.lane[0];
}
COMMRT_INLINE std::uint32_t max_lanes(Vu x) {
  std::uint32_t most = 0;
  COMMRT_EACH_LANE most = x.lane[i] > most ? x.lane[i] : most;
  return most;
}
// value where x > threshold, else 0
COMMRT_INLINE Vf where_greater(Vf x, Vf threshold, Vf value) {
  COMMRT_EACH_LANE x.lane[i] = x.lane[i] > threshold.lane[i] ? value.lane[i] : 0.0f;
  return x;
}
// +1 or -1: the sign of a 1-bit code
COMMRT_INLINE Vf sign_of(Vf x) {
  COMMRT_EACH_LANE x.lane[i] = x.lane[i] < 0.0f ? -1.0f : 1.0f;
  return x;
}

template <DType dtype>
COMMRT_INLINE Vf load(const void* from) {
  Vf r;
  if constexpr (dtype == DType::kFloat32) {
    std::memcpy(&r, from, sizeof r);
  } else {
    std::uint16_t half[16];
    std::memcpy(half, from, sizeof half);
    COMMRT_EACH_LANE r.lane[i] =
        dtype == DType::kBFloat16 ? bf16_to_float(half[i]) : fp16_to_float(half[i]);
  }
  return r;
}
template <DType dtype>
COMMRT_INLINE void store(void* to, Vf x) {
  if constexpr (dtype == DType::kFloat32) {
    std::memcpy(to, &x, sizeof x);
  } else {
    std::uint16_t half[16];
    COMMRT_EACH_LANE half[i] =
        dtype == DType::kBFloat16 ? float_to_bf16(x.lane[i]) : float_to_fp16(x.lane[i]);
    std::memcpy(to, half, sizeof half);
  }
}
template <DType dtype>
COMMRT_INLINE void stream(void* to, Vf x) {
  store<dtype>(to, x);
}
COMMRT_INLINE void stream_fence() {}
COMMRT_INLINE void prefetch(const void* address) { __builtin_prefetch(address); }

template <int bits>
COMMRT_INLINE Vf load_codes(const std::uint8_t* from) {
  Vf r;
  if constexpr (bits == 1) {
    std::uint16_t word;
    std::memcpy(&word, from, sizeof word);
    COMMRT_EACH_LANE r.lane[i] = (word >> i & 1) ? -1.0f : 1.0f;
  } else {
    constexpr int per_byte = 8 / bits;
    COMMRT_EACH_LANE {
      const std::uint32_t byte = from[i / per_byte];
      const auto top = static_cast<std::int32_t>(byte << (32 - bits - bits * (i % per_byte)));
      r.lane[i] = static_cast<float>(top >> (32 - bits));
    }
  }
  return r;
}
template <int bits>
COMMRT_INLINE void store_codes(std::uint8_t* to, Vf codes) {
  if constexpr (bits == 1) {
    std::uint32_t word = 0;
    COMMRT_EACH_LANE word |= static_cast<std::uint32_t>(codes.lane[i] < 0.0f) << i;
    const auto half = static_cast<std::uint16_t>(word);
    std::memcpy(to, &half, sizeof half);
  } else {
    constexpr int per_byte = 8 / bits;
    constexpr std::uint32_t mask = (1u << bits) - 1;
    codes = round_even(codes);
    for (int byte = 0; byte < 2 * bits; ++byte) {
      std::uint32_t packed = 0;
      for (int k = 0; k < per_byte; ++k) {
        const auto code = static_cast<std::int32_t>(codes.lane[byte * per_byte + k]);
        packed |= (static_cast<std::uint32_t>(code) & mask) << (bits * k);
      }
      to[byte] = static_cast<std::uint8_t>(packed);
    }
  }
}

COMMRT_INLINE void fill_uniform(float* out, int count, std::uint64_t seed, Stream stream,
                                std::uint64_t index) {
  for (int i = 0; i < count; i += 4) {
    const Philox4 x = philox(seed, stream, (index + i) / 4);
    for (int k = 0; k < 4; ++k) out[i + k] = uniform_from_word(x.word[k]);
  }
}

#undef COMMRT_EACH_LANE

}  // namespace commrt::COMMRT_ISA
