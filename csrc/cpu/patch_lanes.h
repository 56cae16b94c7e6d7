// What of 32 elements has changed and how, by each instruction set:
//
//   changed_lanes   a bit for each element whose bits differ
//   take_changes    appends the codes of these elements, and the new bits of those that escape
#pragma once

#include <cstring>

#include "../math/patch.h"
#include "simd.h"

namespace commrt::COMMRT_ISA {

constexpr int kPatchLanes = 32;

// Of a group. Vectors of up to sixteen are stored where fewer may be new.
template <typename Word>
struct Changes {
  std::uint32_t mask[kPatchGroup / kPatchLanes];
  int num_changed, num_escaped;
  std::uint8_t codes[kPatchGroup + kLanes];  // a byte each
  Word escaped[kPatchGroup + kLanes];
};

#if defined(COMMRT_USE_AVX512)

template <typename Word>
COMMRT_INLINE std::uint32_t changed_lanes(const Word* after, const Word* before) {
  const __m512i a = _mm512_loadu_si512(after), b = _mm512_loadu_si512(before);
  if constexpr (sizeof(Word) == 2) return _mm512_cmpneq_epi16_mask(a, b);
  const __m512i c = _mm512_loadu_si512(after + kLanes), d = _mm512_loadu_si512(before + kLanes);
  return _mm512_cmpneq_epi32_mask(a, b) | _mm512_cmpneq_epi32_mask(c, d) << kLanes;
}

// Sixteen elements, those of two bytes with their sign extended.
template <typename Word>
COMMRT_INLINE __m512i load_bits(const Word* from) {
  if constexpr (sizeof(Word) == 4) return _mm512_loadu_si512(from);
  return _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

template <typename Word>
COMMRT_INLINE __m512i ordered_lanes(__m512i bits) {
  const __m512i magnitude = _mm512_set1_epi32(sizeof(Word) == 4 ? 0x7fffffff : 0x7fff);
  return _mm512_xor_si512(bits, _mm512_and_si512(_mm512_srai_epi32(bits, 31), magnitude));
}

// change_code() of sixteen elements; anything where they are the same.
template <typename Word>
COMMRT_INLINE __m512i code_lanes(__m512i after, __m512i before) {
  __m512i steps = _mm512_sub_epi32(ordered_lanes<Word>(after), ordered_lanes<Word>(before));
  if constexpr (sizeof(Word) == 2) steps = _mm512_srai_epi32(_mm512_slli_epi32(steps, 16), 16);
  const __m512i zigzag =
      _mm512_xor_si512(_mm512_slli_epi32(steps, 1), _mm512_srai_epi32(steps, 31));
  return _mm512_min_epu32(_mm512_sub_epi32(zigzag, _mm512_set1_epi32(1)),
                          _mm512_set1_epi32(kEscape));
}

template <typename Word>
COMMRT_INLINE void take_changes(const Word* after, const Word* before, std::uint32_t mask,
                                Changes<Word>& to) {
  for (int half = 0; half < 2; ++half, after += kLanes, before += kLanes, mask >>= kLanes) {
    const auto lanes = static_cast<__mmask16>(mask);
    const __m512i bits = load_bits(after);
    const __m512i codes = code_lanes<Word>(bits, load_bits(before));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to.codes + to.num_changed),
                     _mm512_cvtepi32_epi8(_mm512_maskz_compress_epi32(lanes, codes)));
    to.num_changed += __builtin_popcount(lanes);
    const __mmask16 escapes =
        _mm512_mask_cmpeq_epi32_mask(lanes, codes, _mm512_set1_epi32(kEscape));
    if (!escapes) continue;
    const __m512i taken = _mm512_maskz_compress_epi32(escapes, bits);
    if constexpr (sizeof(Word) == 4) {
      _mm512_storeu_si512(to.escaped + to.num_escaped, taken);
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.escaped + to.num_escaped),
                          _mm512_cvtepi32_epi16(taken));
    }
    to.num_escaped += __builtin_popcount(escapes);
  }
}

#else

#if defined(COMMRT_USE_AVX2)

COMMRT_INLINE __m256i load_vector(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

template <typename Word>
COMMRT_INLINE std::uint32_t changed_lanes(const Word* after, const Word* before) {
  std::uint32_t same = 0;
  if constexpr (sizeof(Word) == 2) {
    const __m256i low = _mm256_cmpeq_epi16(load_vector(after), load_vector(before));
    const __m256i high = _mm256_cmpeq_epi16(load_vector(after + 16), load_vector(before + 16));
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xd8);
    same = static_cast<std::uint32_t>(_mm256_movemask_epi8(bytes));
  } else {
    for (int i = 0; i < kPatchLanes; i += 8) {
      const __m256i equal = _mm256_cmpeq_epi32(load_vector(after + i), load_vector(before + i));
      same |= static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(equal))) << i;
    }
  }
  return ~same;
}

#else

template <typename Word>
COMMRT_INLINE std::uint32_t changed_lanes(const Word* after, const Word* before) {
  if (std::memcmp(after, before, sizeof(Word) * kPatchLanes) == 0) return 0;
  std::uint32_t mask = 0;
  for (int i = 0; i < kPatchLanes; ++i) mask |= std::uint32_t{after[i] != before[i]} << i;
  return mask;
}

#endif

template <typename Word>
COMMRT_INLINE void take_changes(const Word* after, const Word* before, std::uint32_t mask,
                                Changes<Word>& to) {
  for (; mask; mask &= mask - 1) {
    const int i = __builtin_ctz(mask);
    const unsigned code = change_code(after[i], before[i]);
    to.codes[to.num_changed++] = static_cast<std::uint8_t>(code);
    to.escaped[to.num_escaped] = after[i];
    to.num_escaped += code == kEscape;
  }
}

#endif

}  // namespace commrt::COMMRT_ISA
