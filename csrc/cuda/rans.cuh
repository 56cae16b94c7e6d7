// rANS: a warp for each segment, a thread for each lane. With fewer lanes the other threads only vote.
#pragma once

#include "../rans.h"
#include "tile.cuh"

namespace commrt::cuda {

// A thread's part of a segment.
struct Lane {
  int index;
  int count;  // symbols of the segment
  std::int64_t first;

  __device__ __forceinline__ explicit Lane(std::int64_t numel)
      : index(static_cast<int>(threadIdx.x)),
        count(rans_symbols(numel, blockIdx.x)),
        first(std::int64_t{blockIdx.x} * kRansSegment) {}
};

// Those of the votes that are of lanes before this one.
__device__ __forceinline__ int votes_before(unsigned votes, int lane) {
  return __popc(votes & ((1u << lane) - 1));
}

__device__ __forceinline__ bool is_row(const RansTable& table, std::int16_t row) {
  return row >= 0 && row < table.num_rows;
}

// Of a symbol; any slots if it has none, or its row is not in the table.
__device__ __forceinline__ Slots slots_to_push(const RansEncodeArgs& args, std::int64_t index,
                                               bool& is_codable, bool& escapes) {
  const std::int16_t row = args.rows[index];
  Slots slots = {0, 0};
  if (is_row(args.table, row)) {
    const std::uint16_t* starts = args.table.starts + row * kSymbols;
    const int symbol = symbol_of(args.codes[index]);
    slots = slots_of(starts, symbol);
    escapes = args.escaped != nullptr && (slots.frequency == 0 || symbol == kEscapeSymbol);
    if (escapes) slots = slots_of(starts, kEscapeSymbol);
  }
  is_codable &= slots.frequency != 0;
  slots.frequency += slots.frequency == 0;
  return slots;
}

// Moves words to lower addresses.
template <typename Word>
__device__ __forceinline__ void move_down(Word* to, const Word* from, int count, int lane) {
  for (int begin = 0; begin < count; begin += kWarp) {
    const int i = begin + lane;
    const Word word = i < count ? from[i] : Word{0};
    __syncwarp();  // all have read what others overwrite
    if (i < count) to[i] = word;
    __syncwarp();
  }
}

template <int threads>
__global__ void __launch_bounds__(threads) rans_encode_kernel(RansEncodeArgs args) {
  const Lane lane(args.numel);
  std::uint16_t* const stream = args.words + blockIdx.x * args.capacity;
  std::uint16_t* const end = stream + args.capacity;
  std::uint16_t* next = end;       // the words are written from the last one on
  int first_escaped = lane.count;  // as are the codes that escape
  std::uint32_t state = kLeastState + (lane.index == 0 ? args.checks[blockIdx.x] : 0);
  bool is_codable = true;
  for (int j = (lane.count - 1) / args.lanes * args.lanes; j >= 0; j -= args.lanes) {
    const bool has_symbol = lane.index < args.lanes && j + lane.index < lane.count;
    const std::int64_t index = lane.first + j + lane.index;
    Slots slots = {};
    bool escapes = false;
    if (has_symbol) slots = slots_to_push(args, index, is_codable, escapes);
    const unsigned escaping = __ballot_sync(kAllLanes, escapes);
    first_escaped -= __popc(escaping);
    if (escapes) {
      const int place = first_escaped + votes_before(escaping, lane.index);
      args.escaped[lane.first + place] = args.codes[index];
    }
    const bool gives = has_symbol && gives_word(state, slots.frequency);
    const unsigned votes = __ballot_sync(kAllLanes, gives);
    next -= __popc(votes);
    if (gives) {
      next[votes_before(votes, lane.index)] = static_cast<std::uint16_t>(state);
      state >>= kWordBits;
    }
    if (has_symbol) state = pushed(state, slots);
  }
  const bool is_whole = __ballot_sync(kAllLanes, !is_codable) == 0;
  const int num_words = static_cast<int>(end - next);
  __syncwarp();  // the words that others have written
  const int num_escaped = lane.count - first_escaped;
  if (lane.index == 0) {
    args.lengths[blockIdx.x] = is_whole ? 2 * args.lanes + num_words : -1;
    if (args.escaped) args.num_escaped[blockIdx.x] = is_whole ? num_escaped : 0;
  }
  if (!is_whole) return;
  if (lane.index < args.lanes) {
    stream[2 * lane.index] = static_cast<std::uint16_t>(state);
    stream[2 * lane.index + 1] = static_cast<std::uint16_t>(state >> kWordBits);
  }
  move_down(stream + 2 * args.lanes, next, num_words, lane.index);
  if (args.escaped == nullptr) return;
  std::int16_t* const escaped = args.escaped + lane.first;
  move_down(escaped, escaped + first_escaped, num_escaped, lane.index);
}

template <int threads>
__global__ void __launch_bounds__(threads) rans_decode_kernel(RansDecodeArgs args) {
  const Lane lane(args.numel);
  const std::int16_t* rows = args.rows + lane.first;
  std::int16_t* codes = args.codes + lane.first;
  const std::uint16_t* stream = args.words + blockIdx.x * args.capacity;
  const int length = args.lengths[blockIdx.x];
  bool is_whole = 2 * args.lanes <= length && length <= args.capacity;
  std::uint32_t state = kLeastState;
  if (is_whole && lane.index < args.lanes) {
    state = stream[2 * lane.index] | std::uint32_t{stream[2 * lane.index + 1]} << kWordBits;
  }
  int next = 2 * args.lanes;
  for (int j = 0; is_whole && j < lane.count; j += args.lanes) {
    const bool has_symbol = lane.index < args.lanes && j + lane.index < lane.count;
    bool is_good = true;
    if (has_symbol) {
      const std::int16_t row = rows[j + lane.index];
      is_good = is_row(args.table, row);
      if (is_good) {
        const std::uint16_t* starts = args.table.starts + row * kSymbols;
        const int symbol = symbol_at(starts, slot_of(state));
        state = popped(state, slots_of(starts, symbol));
        codes[j + lane.index] = code_of(symbol);
      }
    }
    const bool takes = has_symbol && state < kLeastState;
    const unsigned votes = __ballot_sync(kAllLanes, takes);
    const int place = next + votes_before(votes, lane.index);
    is_good &= !takes || place < length;
    if (takes && is_good) state = state << kWordBits | stream[place];
    next += __popc(votes);
    is_whole = __ballot_sync(kAllLanes, !is_good) == 0;
  }
  const bool is_at_start = lane.index == 0 ? state >> kWordBits == 1 : state == kLeastState;
  is_whole &= __ballot_sync(kAllLanes, !is_at_start) == 0;
  if (lane.index == 0) {
    args.used[blockIdx.x] = is_whole ? next : -1;
    args.checks[blockIdx.x] = is_whole ? static_cast<std::uint16_t>(state) : std::uint16_t{0};
  }
  if (is_whole) return;
  __syncwarp();  // what others have decoded is overwritten
  for (int j = lane.index; j < lane.count; j += kWarp) codes[j] = 0;
}

}  // namespace commrt::cuda
