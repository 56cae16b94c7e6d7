// AVX-512 F, BW, DQ, VL.
#pragma once

#include <immintrin.h>

#include <cstring>

#define COMMRT_UNROLL _Pragma("GCC unroll 4")

namespace commrt::COMMRT_ISA {

using Vf = __m512;
using Vu = __m512i;
struct Group {
  Vf first, second;
};

COMMRT_INLINE Vf broadcast(float x) { return _mm512_set1_ps(x); }
COMMRT_INLINE Vf add(Vf a, Vf b) { return _mm512_add_ps(a, b); }
COMMRT_INLINE Vf sub(Vf a, Vf b) { return _mm512_sub_ps(a, b); }
COMMRT_INLINE Vf mul(Vf a, Vf b) { return _mm512_mul_ps(a, b); }
COMMRT_INLINE Vf div(Vf a, Vf b) { return _mm512_div_ps(a, b); }
COMMRT_INLINE Vf sqrt(Vf x) { return _mm512_sqrt_ps(x); }
COMMRT_INLINE Vf copy_sign(Vf magnitude, Vf sign) {
  return _mm512_or_ps(magnitude, _mm512_and_ps(sign, broadcast(-0.0f)));
}
COMMRT_INLINE Vf exact_fma(Vf a, Vf b, Vf c) { return _mm512_fmadd_ps(a, b, c); }
COMMRT_INLINE Vf exact_fnma(Vf a, Vf b, Vf c) { return _mm512_fnmadd_ps(a, b, c); }
COMMRT_INLINE Vf clamp(Vf x, float limit) {
  return _mm512_max_ps(_mm512_min_ps(x, broadcast(limit)), broadcast(-limit));
}
COMMRT_INLINE Vf round_even(Vf x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
COMMRT_INLINE Vf floor(Vf x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
COMMRT_INLINE Vu abs_bits(Vf x) {
  return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
}
COMMRT_INLINE Vf as_floats(Vu x) { return _mm512_castsi512_ps(x); }
COMMRT_INLINE Vu zero_words() { return _mm512_setzero_si512(); }
COMMRT_INLINE Vu max_words(Vu a, Vu b) { return _mm512_max_epu32(a, b); }
// max(a, |b|) of finite numbers, a >= 0.
COMMRT_INLINE Vf max_magnitude(Vf a, Vf b) { return _mm512_range_ps(a, b, 0x0b); }
COMMRT_INLINE float sum_lanes(Vf x) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
COMMRT_INLINE std::uint32_t max_lanes(Vu x) { return _mm512_reduce_max_epu32(x); }
COMMRT_INLINE Vf where_greater(Vf x, Vf threshold, Vf value) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, threshold, _CMP_GT_OQ), value);
}
COMMRT_INLINE Vf where_less(Vf a, Vf b, Vf yes, Vf no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
COMMRT_INLINE Vf sign_of(Vf x) {
  const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  return _mm512_mask_blend_ps(negative, broadcast(1.0f), broadcast(-1.0f));
}

template <DType dtype>
COMMRT_INLINE Vf load(const void* from) {
  if constexpr (dtype == DType::kFloat32) {
    return _mm512_loadu_ps(from);
  } else {
    const __m256i half = _mm256_loadu_si256(static_cast<const __m256i*>(from));
    if constexpr (dtype == DType::kFloat16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
}
// Round to nearest even; NaN becomes the canonical quiet NaN.
template <DType dtype>
COMMRT_INLINE __m256i to_half(Vf x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  if constexpr (dtype == DType::kFloat16) {
    const __m256i half = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i sign = _mm512_cvtepi32_epi16(
        _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x8000)));
    const __m256i quiet = _mm256_or_si256(sign, _mm256_set1_epi16(0x7e00));
    return _mm256_mask_mov_epi16(half, is_nan, quiet);
  } else {
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0)));
  }
}
template <DType dtype>
COMMRT_INLINE void store(void* to, Vf x) {
  if constexpr (dtype == DType::kFloat32) {
    _mm512_storeu_ps(to, x);
  } else {
    _mm256_storeu_si256(static_cast<__m256i*>(to), to_half<dtype>(x));
  }
}
// `to` is aligned to the sixteen elements.
template <DType dtype>
COMMRT_INLINE void stream(void* to, Vf x) {
  if constexpr (dtype == DType::kFloat32) {
    _mm512_stream_ps(static_cast<float*>(to), x);
  } else {
    _mm256_stream_si256(static_cast<__m256i*>(to), to_half<dtype>(x));
  }
}
COMMRT_INLINE void stream_fence() { _mm_sfence(); }
COMMRT_INLINE void prefetch(const void* address) {
  _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0);
}

// Sixteen codes of 1, 2 or 8 bits.
template <int bits>
COMMRT_INLINE Vf load_run(const std::uint8_t* from) {
  if constexpr (bits == 8) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
  } else if constexpr (bits == 2) {
    std::uint32_t word;
    std::memcpy(&word, from, sizeof word);
    const __m512i shift =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i crumbs = _mm512_srlv_epi32(_mm512_set1_epi32(static_cast<int>(word)), shift);
    const __m512 value_of = _mm512_setr_ps(0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1);
    return _mm512_permutexvar_ps(crumbs, value_of);
  } else {
    std::uint16_t word;
    std::memcpy(&word, from, sizeof word);
    return _mm512_mask_blend_ps(word, broadcast(1.0f), broadcast(-1.0f));
  }
}
template <int bits>
COMMRT_INLINE void store_run(std::uint8_t* to, Vf codes) {
  if constexpr (bits == 8) {
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(codes));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
  } else if constexpr (bits == 2) {
    const __m512i integers = _mm512_and_si512(_mm512_cvtps_epi32(codes), _mm512_set1_epi32(3));
    const __m128i pairs = _mm_maddubs_epi16(_mm512_cvtepi32_epi8(integers), _mm_set1_epi16(0x0401));
    const __m128i quads = _mm_madd_epi16(pairs, _mm_set1_epi32(0x00100001));
    _mm_storeu_si32(to, _mm_cvtepi32_epi8(quads));
  } else {
    const std::uint16_t word = _mm512_cmp_ps_mask(codes, _mm512_setzero_ps(), _CMP_LT_OQ);
    std::memcpy(to, &word, sizeof word);
  }
}
template <int bits>
COMMRT_INLINE Group load_codes(const std::uint8_t* from) {
  if constexpr (bits == 4) {
    // The permute looks at the low four bits of each lane only.
    const __m512i bytes =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    const __m512 value_of = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    return {_mm512_permutexvar_ps(bytes, value_of),
            _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), value_of)};
  } else {
    return {load_run<bits>(from), load_run<bits>(from + 2 * bits)};
  }
}
template <int bits>
COMMRT_INLINE void store_codes(std::uint8_t* to, Group codes) {
  if constexpr (bits == 4) {
    const __m512i high = _mm512_slli_epi32(_mm512_cvtps_epi32(codes.second), 4);
    constexpr int and_or = 0xea;
    const __m512i bytes = _mm512_ternarylogic_epi32(_mm512_cvtps_epi32(codes.first),
                                                    _mm512_set1_epi32(0xf), high, and_or);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(bytes));
  } else {
    store_run<bits>(to, codes.first);
    store_run<bits>(to + 2 * bits, codes.second);
  }
}

// Sixteen counters at once, each in a lane of 64 bits whose upper half does not matter: eight, and the
// eight that are four further. Merged, lane 4 L + j has counter 4 j + L, so that the 4 x 4 transpose
// inside each 128-bit part leaves the words in element order.
COMMRT_INLINE void philox_words(std::uint64_t seed, Stream stream, std::uint64_t counter,
                                __m512i words[4]) {
  const __m512i multiplier0 = _mm512_set1_epi64(kPhiloxMultiplier0);
  const __m512i multiplier1 = _mm512_set1_epi64(kPhiloxMultiplier1);
  const __m512i first = _mm512_add_epi64(_mm512_set1_epi64(static_cast<long long>(counter)),
                                         _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11));
  __m512i x0[2] = {first, _mm512_add_epi64(first, _mm512_set1_epi64(4))};
  __m512i x1[2] = {_mm512_srli_epi64(x0[0], 32), _mm512_srli_epi64(x0[1], 32)};
  __m512i x2[2] = {_mm512_set1_epi64(static_cast<int>(stream)),
                   _mm512_set1_epi64(static_cast<int>(stream))};
  __m512i x3[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  auto key0 = static_cast<std::uint32_t>(seed);
  auto key1 = static_cast<std::uint32_t>(seed >> 32);
  constexpr int exclusive_or = 0x96;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const __m512i wide_key0 = _mm512_set1_epi64(key0), wide_key1 = _mm512_set1_epi64(key1);
    for (int i = 0; i < 2; ++i) {
      const __m512i product0 = _mm512_mul_epu32(x0[i], multiplier0);
      const __m512i product1 = _mm512_mul_epu32(x2[i], multiplier1);
      x0[i] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product1, 32), x1[i], wide_key0,
                                        exclusive_or);
      x2[i] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product0, 32), x3[i], wide_key1,
                                        exclusive_or);
      x1[i] = product1;
      x3[i] = product0;
    }
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  const auto merged = [](const __m512i(&x)[2]) COMMRT_INLINE_LAMBDA {
    return _mm512_mask_shuffle_epi32(x[0], 0xaaaa, x[1], _MM_PERM_CCAA);
  };
  const __m512i y0 = merged(x0), y1 = merged(x1), y2 = merged(x2), y3 = merged(x3);
  const __m512i a = _mm512_unpacklo_epi32(y0, y1), b = _mm512_unpackhi_epi32(y0, y1);
  const __m512i c = _mm512_unpacklo_epi32(y2, y3), d = _mm512_unpackhi_epi32(y2, y3);
  words[0] = _mm512_unpacklo_epi64(a, c);
  words[1] = _mm512_unpackhi_epi64(a, c);
  words[2] = _mm512_unpacklo_epi64(b, d);
  words[3] = _mm512_unpackhi_epi64(b, d);
}

COMMRT_INLINE void fill_uniform(float* out, int count, std::uint64_t seed, Stream stream,
                                std::uint64_t index) {
  for (int i = 0; i < count; i += 64) {
    __m512i words[4];
    philox_words(seed, stream, (index + i) / 4, words);
    for (int k = 0; k < 4; ++k) {
      const Vf integers = _mm512_cvtepi32_ps(_mm512_srli_epi32(words[k], 8));
      _mm512_storeu_ps(out + i + 16 * k, mul(integers, broadcast(0x1p-24f)));
    }
  }
}

}  // namespace commrt::COMMRT_ISA
