// Divisions of a coder's states by frequencies, as multiplications.
#pragma once

#include <cstdint>

#include "../math/rans.h"

namespace commrt {

// Of each frequency f the inverse m = floor(2**46 / f) + 1. With e = m f - 2**46, in (0, f],
//
//     x m / 2**46 = x / f + x e / (f 2**46)
//
// has the integer part of x / f if x e < 2**46. A state x that takes a symbol is less than 2**18 f,
// hence x e < 2**18 f**2 <= 2**46; and x m fits 64 bits, since f m <= 2**46 + f.
class RansInverses {
 public:
  constexpr RansInverses() : inverses_{} {
    for (std::uint64_t f = 1; f <= kSlots; ++f) inverses_[f] = (std::uint64_t{1} << kShift) / f + 1;
  }
  std::uint32_t quotient(std::uint32_t state, std::uint32_t frequency) const {
    return static_cast<std::uint32_t>(state * inverses_[frequency] >> kShift);
  }

 private:
  static constexpr int kShift = 32 + kSlotBits;
  std::uint64_t inverses_[kSlots + 1];  // 128 KiB, of which a table of codes needs little
};

inline constexpr RansInverses kInverses;

}  // namespace commrt
