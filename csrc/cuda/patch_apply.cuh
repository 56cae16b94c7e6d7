// patch_apply: a warp for each group, eight elements a lane and row. Where a lane's codes begin, it
// counts in the mask before it, and where its escaped elements do, in the codes before them.
#pragma once

#include "../math/patch.h"
#include "bits.cuh"
#include "tile.cuh"

namespace commrt::cuda {

constexpr int kPatchRows = kPatchGroup / kRow;

// -- a patch --------------------------------------------------------------------------------------

struct Count {
  int before;  // of the lanes before this one
  int total;   // of the warp
};

// Sums of at most eight a lane, by a vote for each of their four bits.
__device__ __forceinline__ Count count_before(int own) {
  const unsigned lanes_before = (1u << threadIdx.x % kWarp) - 1;
  Count count = {0, 0};
#pragma unroll
  for (int bit = 0; bit < 4; ++bit) {
    const unsigned votes = __ballot_sync(kAllLanes, own >> bit & 1);
    count.before += __popc(votes & lanes_before) << bit;
    count.total += __popc(votes) << bit;
  }
  return count;
}

// Up to eight codes from the position-th on; zeros behind them.
__device__ __forceinline__ std::uint32_t load_codes(const std::uint32_t* codes, int position,
                                                    int count) {
  if (count == 0) return 0;
  const int skipped = position % 8;
  const std::uint32_t* words = codes + position / 8;
  std::uint32_t eight = words[0] >> 4 * skipped;
  if (skipped + count > 8) eight |= words[1] << 4 * (8 - skipped);
  return count == 8 ? eight : eight & ((1u << 4 * count) - 1);
}

// The changes of the elements that `mask` names.
template <typename Word>
__device__ __forceinline__ void change_bits(unsigned mask, std::uint32_t codes, const Word* escaped,
                                            Word (&bits)[kPerLane]) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (!(mask >> i & 1)) continue;
    const unsigned code = codes & 15u;
    bits[i] = code == kEscape ? *escaped++ : changed(bits[i], code);
    codes >>= 4;
  }
}

template <typename Word>
__device__ __forceinline__ void apply_patch(const std::uint32_t* body, Word* weights, int count) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int all_changed = sum_over(kWarp, __popc(body[lane]));
  const std::uint32_t* codes = body + kPatchMaskBytes / 4;
  const auto* escaped = reinterpret_cast<const Word*>(codes + code_region_bytes(all_changed) / 4);
  int num_changed = 0, num_escaped = 0;
  for (int row = 0; row < kPatchRows; ++row) {
    const int element = row * kRow + lane * kPerLane, word = element / 32;
    const unsigned mask = body[word] >> element % 32 & 0xffu;
    const Count changes = count_before(__popc(mask));
    const std::uint32_t eight = load_codes(codes, num_changed + changes.before, __popc(mask));
    const Count escapes = count_before(__popc(escapes_among(eight)));
    if (mask) {
      const int left = count - element, valid = left < kPerLane ? left : kPerLane;
      Word bits[kPerLane];
      load_bits(weights + element, valid, bits);
      change_bits(mask, eight, escaped + num_escaped + escapes.before, bits);
      store_bits(weights + element, valid, bits);
    }
    num_changed += changes.total;
    num_escaped += escapes.total;
  }
}

// -- raw elements ---------------------------------------------------------------------------------

// By words where the weights lie so, in the order of the lanes: a body is seldom aligned to more.
template <typename Word>
__device__ __forceinline__ void copy_raw(const std::uint32_t* __restrict__ body,
                                         Word* __restrict__ weights, int count) {
  constexpr int kPerWord = 4 / sizeof(Word);
  const auto* from = reinterpret_cast<const Word*>(body);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int words = is_aligned(weights, 4) ? count / kPerWord : 0;
#pragma unroll 8
  for (int i = lane; i < words; i += kWarp) reinterpret_cast<std::uint32_t*>(weights)[i] = body[i];
  for (int i = words * kPerWord + lane; i < count; i += kWarp) weights[i] = from[i];
}

// The payload is what an encoder wrote: nothing of it is checked here.
template <int size>
__global__ void __launch_bounds__(kThreads) patch_apply_kernel(PatchApplyArgs args) {
  using Word = Bits<size>;
  const std::int64_t group = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (group >= patch_groups(args.numel)) return;
  const auto* words = reinterpret_cast<const std::uint32_t*>(args.payload);
  const std::uint32_t entry = words[kPatchTotalBytes / 4 + group];
  if (entry_kind(entry) == PatchKind::kSame) return;
  const std::uint32_t* body = words + entry_offset(entry) / 4;
  const std::int64_t first = group * kPatchGroup, left = args.numel - first;
  const int count = static_cast<int>(left < kPatchGroup ? left : kPatchGroup);
  Word* weights = static_cast<Word*>(args.weights) + first;
  if (entry_kind(entry) == PatchKind::kPatch) return apply_patch(body, weights, count);
  copy_raw(body, weights, count);
}

}  // namespace commrt::cuda
