#include <algorithm>
#include <cstring>

#include "../rans.h"
#include "rans_inverse.h"
#include "rans_symbol.h"

namespace commrt::COMMRT_ISA {
namespace {

// A word more or less can be foreseen where there are few lanes, since each has its own measure.
constexpr int kMostForeseen = 4;

template <int lanes>
struct Encoder {
  const RansTable table;
  std::uint16_t* words;   // the last one first
  std::int16_t* escaped;  // the last one first; null if none may
  std::uint32_t states[lanes];
  bool is_codable;

  Encoder(const RansTable& table, std::uint16_t* end, std::int16_t* escaped_end,
          std::uint16_t check)
      : table(table), words(end), escaped(escaped_end), is_codable(true) {
    for (std::uint32_t& state : states) state = kLeastState;
    states[0] += check;
  }

  // As pushed() does it, without a division.
  COMMRT_MEMBER void push(int lane, std::int16_t code, std::int16_t row) {
    const std::uint16_t* starts = table.starts + std::int64_t{row} * kSymbols;
    const int symbol = symbol_of(code);
    Slots slots = slots_of(starts, symbol);
    if (slots.frequency == 0 || symbol == kEscapeSymbol) [[unlikely]] {
      slots = slots_to_escape(starts, slots, code);
    }
    const std::uint32_t state = without_word(states[lane], slots.frequency);
    const std::uint32_t quotient = kInverses.quotient(state, slots.frequency);
    states[lane] = state + quotient * (kSlots - slots.frequency) + slots.first;
  }

  COMMRT_MEMBER Slots slots_to_escape(const std::uint16_t* starts, Slots slots, std::int16_t code) {
    if (escaped) {
      *--escaped = code;
      slots = slots_of(starts, kEscapeSymbol);
    }
    is_codable &= slots.frequency != 0;
    return slots;
  }

  COMMRT_MEMBER std::uint32_t without_word(std::uint32_t state, std::uint32_t frequency) {
    const bool gives = gives_word(state, frequency);
    if constexpr (lanes <= kMostForeseen) {
      if (!gives) [[likely]]
        return state;
      *--words = static_cast<std::uint16_t>(state);
      return state >> kWordBits;
    } else {
      words[-1] = static_cast<std::uint16_t>(state);  // overwritten if it is not given away
      words -= gives;
      return state >> gives * kWordBits;
    }
  }
};

// The words of the stream; -1 if it cannot be.
template <int lanes>
COMMRT_PHASE std::int32_t encode_segment(const RansEncodeArgs& args, std::int64_t segment) {
  const std::int16_t *codes = args.codes + segment * kRansSegment,
                     *rows = args.rows + segment * kRansSegment;
  std::uint16_t *const stream = args.words + segment * args.capacity, *const end =
                                                                          stream + args.capacity;
  int j = rans_symbols(args.numel, segment);
  if (!are_rows(rows, j, args.table.num_rows)) return -1;
  std::int16_t* const escaped = args.escaped ? args.escaped + segment * kRansSegment : nullptr;
  std::int16_t* const escaped_end = escaped ? escaped + j : nullptr;
  Encoder<lanes> encoder(args.table, end, escaped_end, args.checks[segment]);
  while (j % lanes) --j, encoder.push(j % lanes, codes[j], rows[j]);
  while (j > 0) {
    j -= lanes;
#pragma GCC unroll 4
    for (int lane = lanes - 1; lane >= 0; --lane) {
      encoder.push(lane, codes[j + lane], rows[j + lane]);
    }
  }
  if (!encoder.is_codable) return -1;
  if (escaped) {
    args.num_escaped[segment] = static_cast<std::int32_t>(escaped_end - encoder.escaped);
    std::copy(encoder.escaped, escaped_end, escaped);
  }
  for (int lane = 0; lane < lanes; ++lane) {
    stream[2 * lane] = static_cast<std::uint16_t>(encoder.states[lane]);
    stream[2 * lane + 1] = static_cast<std::uint16_t>(encoder.states[lane] >> kWordBits);
  }
  const auto num_words = end - encoder.words;
  std::memmove(stream + 2 * lanes, encoder.words, sizeof *stream * num_words);
  return static_cast<std::int32_t>(2 * lanes + num_words);
}

}  // namespace

void rans_encode(const RansEncodeArgs& args, std::int64_t begin, std::int64_t end) {
  with_lanes(args.lanes, [&]<int lanes>() {
    for (std::int64_t segment = begin; segment < end; ++segment) {
      if (args.escaped) args.num_escaped[segment] = 0;
      args.lengths[segment] = encode_segment<lanes>(args, segment);
    }
  });
}

}  // namespace commrt::COMMRT_ISA
