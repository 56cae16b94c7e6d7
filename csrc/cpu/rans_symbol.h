// What both coders do by each instruction set.
#pragma once

#include <algorithm>

#include "../math/rans.h"
#include "simd.h"

namespace commrt::COMMRT_ISA {

// Whether each row is in a table.
COMMRT_PHASE bool are_rows(const std::int16_t* rows, std::int64_t count, std::int64_t num_rows) {
  std::uint16_t most = 0;  // of the rows, of which those below zero are the largest
  for (std::int64_t j = 0; j < count; ++j)
    most = std::max(most, static_cast<std::uint16_t>(rows[j]));
  return count == 0 || most < num_rows;
}

// Which symbol a slot belongs to: how many of a row's starts are not above it.
#if defined(COMMRT_USE_AVX512)

COMMRT_INLINE int find_symbol(const std::uint16_t* row, std::uint32_t slot) {
  const __m512i slots = _mm512_set1_epi16(static_cast<short>(slot));
  const std::uint64_t low = _mm512_cmple_epu16_mask(_mm512_loadu_si512(row), slots);
  const std::uint64_t high = _mm512_cmple_epu16_mask(_mm512_loadu_si512(row + 32), slots);
  return __builtin_popcountll((low | high << 32) >> 1);
}

#elif defined(COMMRT_USE_AVX2)

COMMRT_INLINE __m256i starts_above(const std::uint16_t* row, __m256i slots) {
  const __m256i starts = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row));
  return _mm256_cmpgt_epi16(starts, slots);
}

// Packing mixes the starts, which does not change how many there are.
COMMRT_INLINE unsigned mask_above(const std::uint16_t* row, __m256i slots) {
  const __m256i bytes = _mm256_packs_epi16(starts_above(row, slots), starts_above(row + 16, slots));
  return static_cast<unsigned>(_mm256_movemask_epi8(bytes));
}

COMMRT_INLINE int find_symbol(const std::uint16_t* row, std::uint32_t slot) {
  const __m256i slots = _mm256_set1_epi16(static_cast<short>(slot));
  const int above =
      __builtin_popcount(mask_above(row, slots)) + __builtin_popcount(mask_above(row + 32, slots));
  return above < kSymbols ? kSymbols - 1 - above : 0;
}

#else

COMMRT_INLINE int find_symbol(const std::uint16_t* row, std::uint32_t slot) {
  return symbol_at(row, slot);
}

#endif

}  // namespace commrt::COMMRT_ISA
