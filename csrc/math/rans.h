// A symbol into a coder's state and out of it again; commrt/ops/rans.py tells how.
#pragma once

#include "float_bits.h"

namespace commrt {

constexpr int kRansSegment = 1 << 18;  // symbols of a stream
constexpr int kSymbols = 64;
constexpr int kMostCode = 31;
constexpr int kEscapeSymbol = kSymbols - 1;
constexpr std::int16_t kEscaped = -32768;
constexpr int kSlotBits = 14;
constexpr std::uint32_t kSlots = 1u << kSlotBits;
constexpr int kWordBits = 16;
constexpr std::uint32_t kLeastState = 1u << kWordBits;

COMMRT_HD int symbol_of(std::int16_t code) {
  const auto symbol = static_cast<unsigned>(code + kMostCode);
  return symbol < kEscapeSymbol ? static_cast<int>(symbol) : kEscapeSymbol;
}
COMMRT_HD std::int16_t code_of(int symbol) {
  return symbol == kEscapeSymbol ? kEscaped : static_cast<std::int16_t>(symbol - kMostCode);
}

struct Slots {
  std::uint32_t first, frequency;
};

// Of a symbol, in its row of a table.
COMMRT_HD Slots slots_of(const std::uint16_t* row, int symbol) {
  const std::uint32_t first = row[symbol];
  return {first, (symbol == kEscapeSymbol ? kSlots : row[symbol + 1]) - first};
}

// Whether the state has to give a word away before it can take a symbol.
COMMRT_HD bool gives_word(std::uint32_t state, std::uint32_t frequency) {
  return state >> (32 - kSlotBits) >= frequency;
}
COMMRT_HD std::uint32_t pushed(std::uint32_t state, Slots slots) {
  const std::uint32_t quotient = state / slots.frequency;
  return (quotient << kSlotBits) + state - quotient * slots.frequency + slots.first;
}

COMMRT_HD std::uint32_t slot_of(std::uint32_t state) { return state & (kSlots - 1); }
COMMRT_HD std::uint32_t popped(std::uint32_t state, Slots slots) {
  return slots.frequency * (state >> kSlotBits) + (slot_of(state) - slots.first);
}

// The last symbol that begins at the slot or before it. By the sign of a difference, since a branch
// could not be foreseen.
COMMRT_HD int symbol_at(const std::uint16_t* row, std::uint32_t slot) {
  int symbol = 0;
  for (int half = kSymbols / 2; half > 0; half /= 2) {
    const int distance = static_cast<int>(slot) - row[symbol + half];
    symbol += half & ~(distance >> 31);
  }
  return symbol;
}

}  // namespace commrt
