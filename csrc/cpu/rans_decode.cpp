#include <algorithm>
#include <cstring>

#include "../rans.h"
#include "rans_symbol.h"

namespace commrt::COMMRT_ISA {
namespace {

// As many words as so many codes have that are mostly near zero; measured. One lane, that waits for
// itself, gains up to three bits a code, others up to one and a half.
COMMRT_INLINE int most_near(int lanes, int count) { return count / 32 * (lanes == 1 ? 6 : 3); }

template <int lanes>
struct Decoder {
  const RansTable table;
  const std::uint16_t *next, *end;
  bool is_whole;  // no word was missing
  std::uint32_t states[lanes];

  Decoder(const RansTable& table, const std::uint16_t* stream, std::int32_t length)
      : table(table), next(stream + 2 * lanes), end(stream + length), is_whole(true) {
    for (int lane = 0; lane < lanes; ++lane) {
      states[lane] = stream[2 * lane] | std::uint32_t{stream[2 * lane + 1]} << kWordBits;
    }
  }

  // For codes of which most are -1, 0 or 1 and take no word: both are foreseen.
  COMMRT_MEMBER std::int16_t pop_near(int lane, std::int16_t row) {
    const std::uint16_t* starts = table.starts + std::int64_t{row} * kSymbols;
    const std::uint32_t below = starts[kMostCode - 1], zero = starts[kMostCode],
                        above = starts[kMostCode + 1], end_of_above = starts[kMostCode + 2];
    const std::uint32_t state = states[lane], slot = slot_of(state);
    if (slot - below >= end_of_above - below) [[unlikely]] {
      const int symbol = find_symbol(starts, slot);
      states[lane] = with_word(popped(state, slots_of(starts, symbol)));
      return code_of(symbol);
    }
    std::uint32_t if_below = popped(state, {below, zero - below});
    std::uint32_t if_zero = popped(state, {zero, above - zero});
    std::uint32_t if_above = popped(state, {above, end_of_above - above});
    // Which one it is cannot be foreseen: all are there before, so that no compiler takes a branch.
    asm("" : "+r"(if_below), "+r"(if_zero), "+r"(if_above));
    const std::uint32_t others = slot >= zero ? if_zero : if_below;
    states[lane] = with_word(slot >= above ? if_above : others);
    return static_cast<std::int16_t>((slot >= zero) + (slot >= above) - 1);
  }

  COMMRT_MEMBER std::uint32_t with_word(std::uint32_t state) {
    if (state >= kLeastState) [[likely]]
      return state;
    is_whole &= next < end;
    return state << kWordBits | (next < end ? *next++ : 0);
  }

  // Without a branch on whether a word is taken, which could not be foreseen.
  template <bool has_words>
  COMMRT_MEMBER std::int16_t pop(int lane, std::int16_t row) {
    const std::uint16_t* starts = table.starts + row * kSymbols;
    const int symbol = find_symbol(starts, slot_of(states[lane]));
    const std::uint32_t state = popped(states[lane], slots_of(starts, symbol));
    const std::uint32_t takes = state < kLeastState;
    const bool is_there = has_words || next < end;
    const std::uint32_t word = is_there ? *next : 0;
    is_whole &= is_there || !takes;
    next += takes & is_there;
    states[lane] = state << takes * kWordBits | (word & (0 - takes));
    return code_of(symbol);
  }

  template <bool has_words>
  COMMRT_MEMBER void pop_row(const std::int16_t* rows, int count, std::int16_t* codes) {
#pragma GCC unroll 4
    for (int lane = 0; lane < count; ++lane) codes[lane] = pop<has_words>(lane, rows[lane]);
  }

  COMMRT_MEMBER void pop_near_row(const std::int16_t* rows, int count, std::int16_t* codes) {
#pragma GCC unroll 4
    for (int lane = 0; lane < count; ++lane) codes[lane] = pop_near(lane, rows[lane]);
  }

  bool is_at_start() const {
    return states[0] >> kWordBits == 1 &&
           std::all_of(states + 1, states + lanes, [](auto state) { return state == kLeastState; });
  }
};

// The words that were used; -1 if no encoder wrote them.
template <int lanes>
COMMRT_PHASE std::int32_t decode_segment(const RansDecodeArgs& args, std::int64_t segment) {
  const std::uint16_t* stream = args.words + segment * args.capacity;
  const std::int16_t* rows = args.rows + segment * kRansSegment;
  std::int16_t* codes = args.codes + segment * kRansSegment;
  const std::int32_t length = args.lengths[segment];
  const int count = rans_symbols(args.numel, segment);
  if (length < 2 * lanes || length > args.capacity) return -1;
  if (!are_rows(rows, count, args.table.num_rows)) return -1;
  Decoder<lanes> decoder(args.table, stream, length);
  int j = 0;
  if (length < most_near(lanes, count)) {
    for (; j + lanes <= count; j += lanes) {
      decoder.pop_near_row(rows + j, lanes, codes + j);
    }
  }
  for (; j + lanes <= count && decoder.end - decoder.next >= lanes; j += lanes) {
    decoder.template pop_row<true>(rows + j, lanes, codes + j);
  }
  for (; j < count && decoder.is_whole; j += lanes) {
    decoder.template pop_row<false>(rows + j, std::min(lanes, count - j), codes + j);
  }
  if (!decoder.is_whole || !decoder.is_at_start()) return -1;
  args.checks[segment] = static_cast<std::uint16_t>(decoder.states[0]);
  return static_cast<std::int32_t>(decoder.next - stream);
}

}  // namespace

void rans_decode(const RansDecodeArgs& args, std::int64_t begin, std::int64_t end) {
  with_lanes(args.lanes, [&]<int lanes>() {
    for (std::int64_t segment = begin; segment < end; ++segment) {
      args.used[segment] = decode_segment<lanes>(args, segment);
      if (args.used[segment] >= 0) continue;
      args.checks[segment] = 0;
      std::int16_t* codes = args.codes + segment * kRansSegment;
      std::fill_n(codes, rans_symbols(args.numel, segment), std::int16_t{0});
    }
  });
}

}  // namespace commrt::COMMRT_ISA
