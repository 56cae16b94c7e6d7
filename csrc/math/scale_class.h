// From an element's energy and dither to its row of the coder's tables.
#pragma once

#include "../dither.h"

namespace commrt {

// Half octaves above the first class; a NaN may have a sign.
COMMRT_HD int scale_class(float energy, int base, int num_classes) {
  const int index = static_cast<int>((float_to_bits(energy) & 0x7fffffffu) >> 22) - base;
  if (index < 0) return 0;
  return index < num_classes ? index : num_classes - 1;
}

// Of a class and a phase, sixteen of which a class has; the phase is a whole number.
COMMRT_HD std::int16_t context_of(int index, float phase) {
  return static_cast<std::int16_t>(16 * index + static_cast<int>(phase));
}
COMMRT_HD std::int16_t row_of_context(const std::int16_t* rows_of_class, int context) {
  return static_cast<std::int16_t>(rows_of_class[context / 16] + context % 16);
}

}  // namespace commrt
