// AVX2, FMA, F16C: two registers of eight lanes.
#pragma once

#include <immintrin.h>

#include <cstring>

#define COMMRT_UNROLL _Pragma("GCC unroll 2")

namespace commrt::COMMRT_ISA {

struct Vf {
  __m256 low, high;
};
struct Vu {
  __m256i low, high;
};
struct Group {
  Vf first, second;
};

COMMRT_INLINE Vf broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
COMMRT_INLINE Vf add(Vf a, Vf b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
COMMRT_INLINE Vf sub(Vf a, Vf b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
COMMRT_INLINE Vf mul(Vf a, Vf b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
COMMRT_INLINE Vf div(Vf a, Vf b) {
  return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
COMMRT_INLINE Vf sqrt(Vf x) { return {_mm256_sqrt_ps(x.low), _mm256_sqrt_ps(x.high)}; }
COMMRT_INLINE Vf copy_sign(Vf magnitude, Vf sign) {
  const __m256 mask = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(magnitude.low, _mm256_and_ps(sign.low, mask)),
          _mm256_or_ps(magnitude.high, _mm256_and_ps(sign.high, mask))};
}
COMMRT_INLINE Vf exact_fma(Vf a, Vf b, Vf c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
COMMRT_INLINE Vf exact_fnma(Vf a, Vf b, Vf c) {
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
COMMRT_INLINE Vf clamp(Vf x, float limit) {
  const __m256 top = _mm256_set1_ps(limit), bottom = _mm256_set1_ps(-limit);
  return {_mm256_max_ps(_mm256_min_ps(x.low, top), bottom),
          _mm256_max_ps(_mm256_min_ps(x.high, top), bottom)};
}
COMMRT_INLINE Vf round_even(Vf x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.low, mode), _mm256_round_ps(x.high, mode)};
}
COMMRT_INLINE Vf floor(Vf x) { return {_mm256_floor_ps(x.low), _mm256_floor_ps(x.high)}; }
COMMRT_INLINE Vu abs_bits(Vf x) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  return {_mm256_and_si256(_mm256_castps_si256(x.low), mask),
          _mm256_and_si256(_mm256_castps_si256(x.high), mask)};
}
COMMRT_INLINE Vf as_floats(Vu x) {
  return {_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)};
}
COMMRT_INLINE Vu zero_words() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
COMMRT_INLINE Vu max_words(Vu a, Vu b) {
  return {_mm256_max_epu32(a.low, b.low), _mm256_max_epu32(a.high, b.high)};
}
// max(a, |b|) of finite numbers, a >= 0.
COMMRT_INLINE Vf max_magnitude(Vf a, Vf b) {
  const Vf x = as_floats(abs_bits(b));
  return {_mm256_max_ps(a.low, x.low), _mm256_max_ps(a.high, x.high)};
}
COMMRT_INLINE float sum_lanes(Vf x) {
  const __m256 eight = _mm256_add_ps(x.low, x.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
COMMRT_INLINE std::uint32_t max_lanes(Vu x) {
  const __m256i eight = _mm256_max_epu32(x.low, x.high);
  const __m128i four =
      _mm_max_epu32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x0e));
  return static_cast<std::uint32_t>(
      _mm_cvtsi128_si32(_mm_max_epu32(two, _mm_shuffle_epi32(two, 0x01))));
}
COMMRT_INLINE Vf where_greater(Vf x, Vf threshold, Vf value) {
  return {_mm256_and_ps(_mm256_cmp_ps(x.low, threshold.low, _CMP_GT_OQ), value.low),
          _mm256_and_ps(_mm256_cmp_ps(x.high, threshold.high, _CMP_GT_OQ), value.high)};
}
COMMRT_INLINE Vf where_less(Vf a, Vf b, Vf yes, Vf no) {
  return {_mm256_blendv_ps(no.low, yes.low, _mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ)),
          _mm256_blendv_ps(no.high, yes.high, _mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ))};
}
COMMRT_INLINE __m256 sign_of_half(__m256 x) {
  const __m256 negative = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LT_OQ);
  return _mm256_blendv_ps(_mm256_set1_ps(1.0f), _mm256_set1_ps(-1.0f), negative);
}
COMMRT_INLINE Vf sign_of(Vf x) { return {sign_of_half(x.low), sign_of_half(x.high)}; }

template <DType dtype>
COMMRT_INLINE __m256 load_eight(const void* from) {
  if constexpr (dtype == DType::kFloat32) {
    return _mm256_loadu_ps(static_cast<const float*>(from));
  } else {
    const __m128i half = _mm_loadu_si128(static_cast<const __m128i*>(from));
    if constexpr (dtype == DType::kFloat16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
}
template <DType dtype>
COMMRT_INLINE Vf load(const void* from) {
  const auto* bytes = static_cast<const std::uint8_t*>(from);
  return {load_eight<dtype>(bytes),
          load_eight<dtype>(bytes + (dtype == DType::kFloat32 ? 32 : 16))};
}
// Eight lanes to eight halves; round to nearest even, NaN becomes the canonical quiet NaN.
template <DType dtype>
COMMRT_INLINE __m128i to_half(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  __m256i half;
  if constexpr (dtype == DType::kFloat16) {
    half = _mm256_cvtepu16_epi32(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x8000));
    const __m256i quiet = _mm256_or_si256(sign, _mm256_set1_epi32(0x7e00));
    half = _mm256_blendv_epi8(half, quiet, is_nan);
  } else {
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    half = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    half = _mm256_blendv_epi8(half, _mm256_set1_epi32(0x7fc0), is_nan);
  }
  return _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}
template <DType dtype>
COMMRT_INLINE void store(void* to, Vf x) {
  if constexpr (dtype == DType::kFloat32) {
    _mm256_storeu_ps(static_cast<float*>(to), x.low);
    _mm256_storeu_ps(static_cast<float*>(to) + 8, x.high);
  } else {
    _mm_storeu_si128(static_cast<__m128i*>(to), to_half<dtype>(x.low));
    _mm_storeu_si128(static_cast<__m128i*>(to) + 1, to_half<dtype>(x.high));
  }
}
// `to` is aligned to the sixteen elements.
template <DType dtype>
COMMRT_INLINE void stream(void* to, Vf x) {
  if constexpr (dtype == DType::kFloat32) {
    _mm256_stream_ps(static_cast<float*>(to), x.low);
    _mm256_stream_ps(static_cast<float*>(to) + 8, x.high);
  } else {
    _mm_stream_si128(static_cast<__m128i*>(to), to_half<dtype>(x.low));
    _mm_stream_si128(static_cast<__m128i*>(to) + 1, to_half<dtype>(x.high));
  }
}
COMMRT_INLINE void stream_fence() { _mm_sfence(); }
COMMRT_INLINE void prefetch(const void* address) {
  _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0);
}

// Eight codes of 1 or 2 bits: the word in every lane, shifted so that the lane's code is on top.
template <int bits>
COMMRT_INLINE __m256 top_codes(std::uint32_t word) {
  const __m256i place = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i shift = _mm256_sub_epi32(_mm256_set1_epi32(32 - bits),
                                         _mm256_mullo_epi32(place, _mm256_set1_epi32(bits)));
  const __m256i top = _mm256_sllv_epi32(_mm256_set1_epi32(static_cast<int>(word)), shift);
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 32 - bits));
}
COMMRT_INLINE Vf widen_bytes(__m128i bytes) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
COMMRT_INLINE __m128i narrow_to_bytes(Vf x) {
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high));
  const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
  return _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
}

// Sixteen codes of 1, 2 or 8 bits.
template <int bits>
COMMRT_INLINE Vf load_run(const std::uint8_t* from) {
  if constexpr (bits == 8) {
    return widen_bytes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  } else if constexpr (bits == 2) {
    std::uint16_t word[2];
    std::memcpy(word, from, sizeof word);
    return {top_codes<2>(word[0]), top_codes<2>(word[1])};
  } else {
    // A set bit arrives as -1, a clear one as 0.
    const Vf minus = {top_codes<1>(from[0]), top_codes<1>(from[1])};
    return exact_fma(minus, broadcast(2.0f), broadcast(1.0f));
  }
}
template <int bits>
COMMRT_INLINE void store_run(std::uint8_t* to, Vf codes) {
  if constexpr (bits == 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrow_to_bytes(codes));
  } else if constexpr (bits == 2) {
    const __m128i crumbs = _mm_and_si128(narrow_to_bytes(codes), _mm_set1_epi8(3));
    const __m128i pairs = _mm_maddubs_epi16(crumbs, _mm_set1_epi16(0x0401));
    const __m128i quads = _mm_madd_epi16(pairs, _mm_set1_epi32(0x00100001));
    _mm_storeu_si32(to, _mm_packus_epi16(_mm_packus_epi32(quads, quads), quads));
  } else {
    const __m256 zero = _mm256_setzero_ps();
    to[0] =
        static_cast<std::uint8_t>(_mm256_movemask_ps(_mm256_cmp_ps(codes.low, zero, _CMP_LT_OQ)));
    to[1] =
        static_cast<std::uint8_t>(_mm256_movemask_ps(_mm256_cmp_ps(codes.high, zero, _CMP_LT_OQ)));
  }
}
template <int bits>
COMMRT_INLINE Group load_codes(const std::uint8_t* from) {
  if constexpr (bits == 4) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m128i mask = _mm_set1_epi8(0xf), sign = _mm_set1_epi8(8);
    const __m128i first = _mm_and_si128(bytes, mask);
    const __m128i second = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
    return {widen_bytes(_mm_sub_epi8(_mm_xor_si128(first, sign), sign)),
            widen_bytes(_mm_sub_epi8(_mm_xor_si128(second, sign), sign))};
  } else {
    return {load_run<bits>(from), load_run<bits>(from + 2 * bits)};
  }
}
template <int bits>
COMMRT_INLINE void store_codes(std::uint8_t* to, Group codes) {
  if constexpr (bits == 4) {
    const __m128i mask = _mm_set1_epi8(0xf);
    const __m128i first = _mm_and_si128(narrow_to_bytes(codes.first), mask);
    const __m128i second = _mm_and_si128(narrow_to_bytes(codes.second), mask);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_or_si128(first, _mm_slli_epi16(second, 4)));
  } else {
    store_run<bits>(to, codes.first);
    store_run<bits>(to + 2 * bits, codes.second);
  }
}

// Eight counters at once, each in a lane of 64 bits whose upper half does not matter: four, and the
// four that are two further. Merged, lane 4 L + j has counter 2 j + L, in the order that the 4 x 4
// transpose undoes.
COMMRT_INLINE void philox_words(std::uint64_t seed, Stream stream, std::uint64_t counter,
                                __m256i words[4]) {
  const __m256i multiplier0 = _mm256_set1_epi64x(kPhiloxMultiplier0);
  const __m256i multiplier1 = _mm256_set1_epi64x(kPhiloxMultiplier1);
  const __m256i first = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<long long>(counter)),
                                         _mm256_setr_epi64x(0, 4, 1, 5));
  __m256i x0[2] = {first, _mm256_add_epi64(first, _mm256_set1_epi64x(2))};
  __m256i x1[2] = {_mm256_srli_epi64(x0[0], 32), _mm256_srli_epi64(x0[1], 32)};
  __m256i x2[2] = {_mm256_set1_epi64x(static_cast<int>(stream)),
                   _mm256_set1_epi64x(static_cast<int>(stream))};
  __m256i x3[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  auto key0 = static_cast<std::uint32_t>(seed);
  auto key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const __m256i wide_key0 = _mm256_set1_epi64x(key0), wide_key1 = _mm256_set1_epi64x(key1);
    for (int i = 0; i < 2; ++i) {
      const __m256i product0 = _mm256_mul_epu32(x0[i], multiplier0);
      const __m256i product1 = _mm256_mul_epu32(x2[i], multiplier1);
      x0[i] = _mm256_xor_si256(_mm256_srli_epi64(product1, 32), _mm256_xor_si256(x1[i], wide_key0));
      x2[i] = _mm256_xor_si256(_mm256_srli_epi64(product0, 32), _mm256_xor_si256(x3[i], wide_key1));
      x1[i] = product1;
      x3[i] = product0;
    }
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  const auto merged = [](const __m256i(&x)[2]) COMMRT_INLINE_LAMBDA {
    return _mm256_blend_epi32(x[0], _mm256_slli_epi64(x[1], 32), 0xaa);
  };
  const __m256i y0 = merged(x0), y1 = merged(x1), y2 = merged(x2), y3 = merged(x3);
  const __m256i a = _mm256_unpacklo_epi32(y0, y1), b = _mm256_unpackhi_epi32(y0, y1);
  const __m256i c = _mm256_unpacklo_epi32(y2, y3), d = _mm256_unpackhi_epi32(y2, y3);
  words[0] = _mm256_unpacklo_epi64(a, c);
  words[1] = _mm256_unpackhi_epi64(a, c);
  words[2] = _mm256_unpacklo_epi64(b, d);
  words[3] = _mm256_unpackhi_epi64(b, d);
}
COMMRT_INLINE void fill_uniform(float* out, int count, std::uint64_t seed, Stream stream,
                                std::uint64_t index) {
  for (int i = 0; i < count; i += 32) {
    __m256i words[4];
    philox_words(seed, stream, (index + i) / 4, words);
    for (int k = 0; k < 4; ++k) {
      const __m256 integers = _mm256_cvtepi32_ps(_mm256_srli_epi32(words[k], 8));
      _mm256_storeu_ps(out + i + 8 * k, _mm256_mul_ps(integers, _mm256_set1_ps(0x1p-24f)));
    }
  }
}

}  // namespace commrt::COMMRT_ISA
