// The same blocks of several ranks' payloads, averaged.
#pragma once

#include "block.h"

namespace commrt::COMMRT_ISA {

// Sum in rank order, then one multiplication by 1 / count, for `vectors` * 16 elements that begin at
// element `at` of a block; the sums stay in registers.
template <int bits, int vectors>
COMMRT_INLINE void average_run(const PayloadStack& stack, int block, std::int64_t index, int at,
                               Vf inverse_count, Vf mean[vectors]) {
  const std::uint8_t* codes = stack.codes + index * code_bytes(bits, block) + at * bits / 8;
  const auto* scales = reinterpret_cast<const std::uint8_t*>(stack.scales + index);
  for (int k = 0; k < vectors; ++k) mean[k] = broadcast(0.0f);
  for (int rank = 0; rank < stack.count; ++rank) {
    std::uint16_t scale_code;
    std::memcpy(&scale_code, scales, sizeof scale_code);
    const Vf scale = broadcast(bf16_to_float(scale_code));
    prefetch(codes + kPrefetchBytes / 4);
    for (int k = 0; k < vectors; k += 2) {
      const Group group = load_codes<bits>(codes + k * kLanes * bits / 8);
      mean[k] = exact_fma(group.first, scale, mean[k]);
      mean[k + 1] = exact_fma(group.second, scale, mean[k + 1]);
    }
    codes += stack.stride;
    scales += stack.stride;
  }
  for (int k = 0; k < vectors; ++k) mean[k] = mul(mean[k], inverse_count);
}

// Call sink(element of the block, sixteen means) over a whole block.
template <int bits, int vectors, typename Sink>
COMMRT_INLINE void average_block(const PayloadStack& stack, int block, std::int64_t index,
                                 Vf inverse_count, Sink sink) {
  for (int at = 0; at < block; at += vectors * kLanes) {
    Vf mean[vectors];
    average_run<bits, vectors>(stack, block, index, at, inverse_count, mean);
    for (int k = 0; k < vectors; ++k) sink(at + k * kLanes, mean[k]);
  }
}

// As average_block, with as many sums in registers as the block allows.
template <int bits, typename Sink>
COMMRT_INLINE void average_block(const PayloadStack& stack, int block, std::int64_t index,
                                 Sink sink) {
  const Vf inverse_count = broadcast(1.0f / static_cast<float>(stack.count));
  if (block == 32) return average_block<bits, 2>(stack, block, index, inverse_count, sink);
  if (block == 64) return average_block<bits, 4>(stack, block, index, inverse_count, sink);
  average_block<bits, 8>(stack, block, index, inverse_count, sink);
}

}  // namespace commrt::COMMRT_ISA
