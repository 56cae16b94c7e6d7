// What the threads of a block and the lanes of a warp do together.
#pragma once

#include <cstring>

#include "thread_block.h"

inline void __syncthreads() { commrt::shim::current_block->sync_threads(); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  commrt::shim::current_block->sync_warp(mask);
}

namespace commrt::shim {

// The value of lane `source`; this lane's own where that is outside its segment of the warp.
template <typename T>
T shuffle(unsigned mask, const char* collective, T value, int source, bool is_inside) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  std::uint64_t sent = 0;
  std::memcpy(&sent, &value, sizeof value);
  const int own = current_block->lane();
  const Exchange done = current_block->exchange(mask, collective, sent, is_inside ? source : own);
  std::memcpy(&value, &done.received, sizeof value);
  return value;
}

}  // namespace commrt::shim

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
  const int first = commrt::shim::current_block->lane() & ~(width - 1);
  return commrt::shim::shuffle(mask, "__shfl_sync", value, first + (source & (width - 1)), true);
}

// A segment also reads from those before it, but not from those behind it.
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize) {
  const int lane = commrt::shim::current_block->lane(), source = lane ^ lane_mask;
  const bool is_inside = source <= (lane | (width - 1));
  return commrt::shim::shuffle(mask, "__shfl_xor_sync", value, source, is_inside);
}

inline unsigned __ballot_sync(unsigned mask, int vote) {
  commrt::shim::ThreadBlock& block = *commrt::shim::current_block;
  return block.exchange(mask, "__ballot_sync", vote != 0, block.lane()).votes;
}
