// What the ops of the dither need of each instruction set, beside simd.h:
//
//   clamp_number     to [-limit, limit]; NaN stays NaN
//   fused            a * b + c, rounded once
//   where_equal      yes where a == b, else no
//   load_shorts      sixteen int16 as floats
//   store_shorts     the reverse, of numbers within the range: rounded to nearest even, NaN to kNanCode
//   to_coordinates   eight vectors, of eight elements' points, to a vector for each coordinate; the
//                    points in any order, the same for all
//   to_elements      the reverse
//   RowTable         store() writes the contexts and rows of these energies and phases
#pragma once

#include <cstring>

#include "../math/scale_class.h"
#include "simd.h"

namespace commrt::COMMRT_ISA {

#if defined(COMMRT_USE_AVX512)

COMMRT_INLINE Vf clamp_number(Vf x, float limit) {
  // Of two numbers one of which is NaN, these give the second.
  return _mm512_max_ps(broadcast(-limit), _mm512_min_ps(broadcast(limit), x));
}
COMMRT_INLINE Vf fused(Vf a, Vf b, Vf c) { return _mm512_fmadd_ps(a, b, c); }
COMMRT_INLINE Vf where_equal(Vf a, Vf b, Vf yes, Vf no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), no, yes);
}
COMMRT_INLINE Vf load_shorts(const std::int16_t* from) {
  const __m256i shorts = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(shorts));
}
COMMRT_INLINE void store_shorts(std::int16_t* to, Vf x) {
  const __m256i shorts = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), shorts);
}

// The 4 x 4 transpose inside each 128-bit part; its own inverse.
COMMRT_INLINE void transpose_parts(Vf* x) {
  const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(x[0], x[1]));
  const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(x[0], x[1]));
  const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(x[2], x[3]));
  const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(x[2], x[3]));
  x[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
  x[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
  x[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
  x[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
}
// Parts are the halves of points, even ones with coordinates 0 to 3.
COMMRT_INLINE void to_coordinates(Vf (&x)[8]) {
  transpose_parts(x);
  transpose_parts(x + 4);
  for (int i = 0; i < 4; ++i) {
    const Vf low = x[i], high = x[i + 4];
    x[i] = _mm512_shuffle_f32x4(low, high, 0x88);
    x[i + 4] = _mm512_shuffle_f32x4(low, high, 0xdd);
  }
}
COMMRT_INLINE void to_elements(Vf (&x)[8]) {
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (int i = 0; i < 4; ++i) {
    const __m512d even = _mm512_castps_pd(x[i]), odd = _mm512_castps_pd(x[i + 4]);
    x[i] = _mm512_castpd_ps(_mm512_permutex2var_pd(even, first, odd));
    x[i + 4] = _mm512_castpd_ps(_mm512_permutex2var_pd(even, second, odd));
  }
  transpose_parts(x);
  transpose_parts(x + 4);
}

class RowTable {
 public:
  COMMRT_MEMBER RowTable(const std::int16_t* rows, int count, int base)
      : base_(_mm512_set1_epi32(base)), last_(_mm512_set1_epi32(count - 1)) {
    alignas(64) std::int16_t all[kMaxClasses] = {};
    std::memcpy(all, rows, sizeof(std::int16_t) * static_cast<std::size_t>(count));
    low_ = _mm512_load_si512(all);
    high_ = _mm512_load_si512(all + kMaxClasses / 2);
  }
  COMMRT_MEMBER void store(std::int16_t* contexts, std::int16_t* rows, Vf energy, Vf phase) const {
    __m512i index = _mm512_sub_epi32(_mm512_srli_epi32(abs_bits(energy), 22), base_);
    index = _mm512_min_epi32(_mm512_max_epi32(index, _mm512_setzero_si512()), last_);
    // Of each pair of words only the first one counts.
    const __m512i first = _mm512_permutex2var_epi16(low_, index, high_);
    const __m512i place = _mm512_cvttps_epi32(phase);
    narrow(contexts, _mm512_add_epi32(_mm512_slli_epi32(index, 4), place));
    narrow(rows, _mm512_add_epi32(first, place));
  }

 private:
  static COMMRT_MEMBER void narrow(std::int16_t* to, __m512i words) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(words));
  }

  __m512i low_, high_, base_, last_;
};

#elif defined(COMMRT_USE_AVX2)

COMMRT_INLINE Vf clamp_number(Vf x, float limit) {
  // Of two numbers one of which is NaN, these give the second.
  const __m256 top = _mm256_set1_ps(limit), bottom = _mm256_set1_ps(-limit);
  return {_mm256_max_ps(bottom, _mm256_min_ps(top, x.low)),
          _mm256_max_ps(bottom, _mm256_min_ps(top, x.high))};
}
COMMRT_INLINE Vf fused(Vf a, Vf b, Vf c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
COMMRT_INLINE Vf where_equal(Vf a, Vf b, Vf yes, Vf no) {
  return {_mm256_blendv_ps(no.low, yes.low, _mm256_cmp_ps(a.low, b.low, _CMP_EQ_OQ)),
          _mm256_blendv_ps(no.high, yes.high, _mm256_cmp_ps(a.high, b.high, _CMP_EQ_OQ))};
}
COMMRT_INLINE __m256 load_eight_shorts(const std::int16_t* from) {
  const __m128i shorts = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(shorts));
}
COMMRT_INLINE Vf load_shorts(const std::int16_t* from) {
  return {load_eight_shorts(from), load_eight_shorts(from + 8)};
}
COMMRT_INLINE void store_shorts(std::int16_t* to, Vf x) {
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(words, 0xd8));
}

// Eight rows of eight; its own inverse.
COMMRT_INLINE void transpose_eight(__m256 (&x)[8]) {
  for (int i = 0; i < 8; i += 4) {
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(x[i], x[i + 1]));
    const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(x[i], x[i + 1]));
    const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(x[i + 2], x[i + 3]));
    const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(x[i + 2], x[i + 3]));
    x[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
    x[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
    x[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
    x[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
  }
  for (int i = 0; i < 4; ++i) {
    const __m256 low = x[i], high = x[i + 4];
    x[i] = _mm256_permute2f128_ps(low, high, 0x20);
    x[i + 4] = _mm256_permute2f128_ps(low, high, 0x31);
  }
}
// Vector i has points 2 i and 2 i + 1; the first points of all are in the low halves.
COMMRT_INLINE void to_coordinates(Vf (&x)[8]) {
  __m256 low[8], high[8];
  for (int i = 0; i < 8; ++i) low[i] = x[i].low;
  for (int i = 0; i < 8; ++i) high[i] = x[i].high;
  transpose_eight(low);
  transpose_eight(high);
  for (int i = 0; i < 8; ++i) x[i] = {low[i], high[i]};
}
COMMRT_INLINE void to_elements(Vf (&x)[8]) { to_coordinates(x); }

class RowTable {
 public:
  COMMRT_MEMBER RowTable(const std::int16_t* rows, int count, int base)
      : base_(_mm256_set1_epi32(base)), last_(_mm256_set1_epi32(count - 1)) {
    for (int i = 0; i < count; ++i) row_of_[i] = rows[i];
  }
  COMMRT_MEMBER void store(std::int16_t* contexts, std::int16_t* rows, Vf energy, Vf phase) const {
    const Vu magnitude = abs_bits(energy);
    const __m256i low = class_of(magnitude.low), high = class_of(magnitude.high);
    narrow(contexts, _mm256_slli_epi32(low, 4), _mm256_slli_epi32(high, 4), phase);
    narrow(rows, _mm256_i32gather_epi32(row_of_, low, 4), _mm256_i32gather_epi32(row_of_, high, 4),
           phase);
  }

 private:
  COMMRT_MEMBER __m256i class_of(__m256i magnitude) const {
    const __m256i index = _mm256_sub_epi32(_mm256_srli_epi32(magnitude, 22), base_);
    return _mm256_min_epi32(_mm256_max_epi32(index, _mm256_setzero_si256()), last_);
  }
  static COMMRT_MEMBER void narrow(std::int16_t* to, __m256i low, __m256i high, Vf phase) {
    const __m256i mask = _mm256_set1_epi32(0xffff);
    low = _mm256_and_si256(_mm256_add_epi32(low, _mm256_cvttps_epi32(phase.low)), mask);
    high = _mm256_and_si256(_mm256_add_epi32(high, _mm256_cvttps_epi32(phase.high)), mask);
    const __m256i words = _mm256_packus_epi32(low, high);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(words, 0xd8));
  }

  int row_of_[kMaxClasses];
  __m256i base_, last_;
};

#else

#define COMMRT_EACH_LANE for (int i = 0; i < 16; ++i)
#define COMMRT_LANEWISE static __attribute__((noinline, unused))

COMMRT_INLINE Vf clamp_number(Vf x, float limit) {
  const Vf top = broadcast(limit);
  x = x > top ? top : x;
  return x < -top ? -top : x;
}
COMMRT_LANEWISE void fuse_lanes(const float* a, const float* b, float* c) {
  COMMRT_EACH_LANE c[i] = __builtin_fmaf(a[i], b[i], c[i]);
}
COMMRT_INLINE Vf fused(Vf a, Vf b, Vf c) {
  float lane[3][16];
  std::memcpy(lane[0], &a, sizeof a);
  std::memcpy(lane[1], &b, sizeof b);
  std::memcpy(lane[2], &c, sizeof c);
  fuse_lanes(lane[0], lane[1], lane[2]);
  std::memcpy(&c, lane[2], sizeof c);
  return c;
}
COMMRT_INLINE Vf where_equal(Vf a, Vf b, Vf yes, Vf no) { return a == b ? yes : no; }
COMMRT_INLINE Vf load_shorts(const std::int16_t* from) {
  float lane[16];
  COMMRT_EACH_LANE lane[i] = from[i];
  Vf x;
  std::memcpy(&x, lane, sizeof x);
  return x;
}
COMMRT_LANEWISE void narrow_shorts(const float* lane, std::int16_t* to) {
  COMMRT_EACH_LANE to[i] = lane[i] == lane[i] ? static_cast<std::int16_t>(lane[i]) : kNanCode;
}
COMMRT_INLINE void store_shorts(std::int16_t* to, Vf x) {
  float lane[16];
  x = round_even(x);
  std::memcpy(lane, &x, sizeof lane);
  narrow_shorts(lane, to);
}

COMMRT_LANEWISE void transpose_lanes(const float* from, float* to, int rows, int columns) {
  for (int i = 0; i < rows * columns; ++i) to[i % columns * rows + i / columns] = from[i];
}
COMMRT_INLINE void to_coordinates(Vf (&x)[8]) {
  float from[8 * 16], to[8 * 16];
  std::memcpy(from, x, sizeof from);
  transpose_lanes(from, to, 16, 8);
  std::memcpy(x, to, sizeof to);
}
COMMRT_INLINE void to_elements(Vf (&x)[8]) {
  float from[8 * 16], to[8 * 16];
  std::memcpy(from, x, sizeof from);
  transpose_lanes(from, to, 8, 16);
  std::memcpy(x, to, sizeof to);
}

class RowTable {
 public:
  RowTable(const std::int16_t* rows, int count, int base)
      : rows_(rows), count_(count), base_(base) {}
  void store(std::int16_t* contexts, std::int16_t* rows, Vf energy, Vf phase) const {
    float lane[2][16];
    std::memcpy(lane[0], &energy, sizeof energy);
    std::memcpy(lane[1], &phase, sizeof phase);
    COMMRT_EACH_LANE {
      contexts[i] = context_of(scale_class(lane[0][i], base_, count_), lane[1][i]);
      rows[i] = row_of_context(rows_, contexts[i]);
    }
  }

 private:
  const std::int16_t* rows_;
  int count_, base_;
};

#undef COMMRT_LANEWISE
#undef COMMRT_EACH_LANE

#endif

}  // namespace commrt::COMMRT_ISA
