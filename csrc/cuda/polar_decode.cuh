// polar_decode: a thread block a code block, a warp a path. The tree is walked by its warps together:
// what one has of a node the others may need when paths split, so that a barrier follows.
#pragma once

#include "../math/polar.h"
#include "polar_bits.cuh"

namespace commrt::cuda {

constexpr int kMostPolarLevels = 17;
constexpr int kSharedLlrs =
    4096;  // of nodes of up to 2048 / paths bits; larger ones are in scratch

// What the warps of a block share.
template <int paths>
struct PolarShared {
  static constexpr int kLargest = kSharedLlrs / 2 / paths;  // node that is in here
  float levels[kSharedLlrs];
  std::uint8_t lefts[kSharedLlrs];
  float cost[4 * paths];  // of the ways in which paths can go on
  int weak[paths][2];
  int of_left[kMostPolarLevels][paths];
  std::uint32_t known[1];  // a bit each; as many as there are
};

__device__ __forceinline__ float sum_of_warp(float x) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, distance);
  }
  return x;
}

// The first of the weakest bits, not counting bit `but`; on every lane. Collective.
__device__ __forceinline__ int weakest(const float* llr, int n, int but) {
  std::uint64_t least = ~std::uint64_t{0};
  for (int i = own_lane(); i < n; i += kWarp) {
    const std::uint64_t key =
        std::uint64_t{magnitude_bits(llr[i])} << 32 | static_cast<unsigned>(i);
    if (i != but && key < least) least = key;
  }
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const std::uint64_t other = __shfl_xor_sync(kAllLanes, least, distance);
    least = other < least ? other : least;
  }
  return static_cast<int>(least & 0xffffffffu);
}

// One block, as one of its warps sees it. The node in hand has 2^level bits from `first` on.
template <int paths>
class PolarDecoder {
 public:
  __device__ __forceinline__ PolarDecoder(const PolarDecodeArgs& args, PolarShared<paths>& shared)
      : shared_(shared), root_(args.log2_size), path_(static_cast<int>(threadIdx.x) / kWarp) {
    const std::int64_t block = blockIdx.x;
    clean_ = args.scratch + block * polar_scratch(root_, paths);
    lefts_ = reinterpret_cast<std::uint8_t*>(clean_ + (std::int64_t{1 + paths} << root_));
    values_ = args.values + (block << root_);
    decoded_ = args.bits + (block << root_);
    load(args.llr + (block << root_), args.known + block * args.known_stride);
  }

  __device__ __forceinline__ void run() {
    int level = root_, first = 0;
    while (true) {
      const unsigned known = known_among(level, first);
      if (known == kSome) {
        split_off_left(level--);
        continue;
      }
      int origin = known == kAll ? take(level, first) : decide(level, first);
      __syncthreads();
      for (; level < root_ && first >> level & 1; first -= 1 << level++) {
        origin = merge(level, first, origin);
        __syncthreads();
      }
      if (level == root_) break;
      if (own_lane() == 0) shared_.of_left[level][path_] = origin;
      split_off_right(level, first, origin);
      __syncthreads();
      first += 1 << level;
    }
    if constexpr (paths > 1) write_likeliest();
  }

 private:
  enum : unsigned { kNone = 0, kSome = 1, kAll = 2 };

  // LLRs that may be anything as they are decoded, and which u are known as words.
  __device__ __forceinline__ void load(const float* llr, const std::uint8_t* known) {
    const int size = 1 << root_;
    for (int i = static_cast<int>(threadIdx.x); i < size; i += paths * kWarp) {
      clean_[i] = clean_llr(llr[i]);
    }
    for (int i = path_; i < size / kWarp; i += paths) {
      const unsigned word = __ballot_sync(kAllLanes, known[i * kWarp + own_lane()] != 0);
      if (own_lane() == 0) shared_.known[i] = word;
    }
    __syncthreads();
  }

  __device__ __forceinline__ unsigned known_among(int level, int first) const {
    const int n = 1 << level;
    if (n < kWarp) {
      const std::uint32_t all = (1u << n) - 1, word = shared_.known[first / kWarp] >> first % kWarp;
      return (word & all) == all ? kAll : (word & all) == 0 ? kNone : kSome;
    }
    std::uint32_t all = ~0u, any = 0;
    for (int i = own_lane(); i < n / kWarp; i += kWarp) {
      all &= shared_.known[first / kWarp + i];
      any |= shared_.known[first / kWarp + i];
    }
    if (__ballot_sync(kAllLanes, any != 0) == 0) return kNone;
    return __ballot_sync(kAllLanes, all != ~0u) == 0 ? kAll : kSome;
  }

  __device__ __forceinline__ float* llr_of(int level, int path) const {
    if (level == root_) return clean_;
    float* levels =
        1 << level <= PolarShared<paths>::kLargest ? shared_.levels : clean_ + (1 << root_);
    return levels + ((paths + path) << level);
  }

  // A left half has a place of its own on its level, a right one lies behind its left one.
  __device__ __forceinline__ std::uint8_t* bits_of(int level, int first, int path) const {
    if constexpr (paths == 1) {
      return decoded_ + first;
    } else {
      while (first >> level & 1) ++level;
      std::uint8_t* lefts = 1 << level <= PolarShared<paths>::kLargest ? shared_.lefts : lefts_;
      return lefts + ((paths + path) << level) + (first & ((1 << level) - 1));
    }
  }

  __device__ __forceinline__ bool is_active() const { return path_ < count_; }

  // Of the warp's own LLRs, so that no barrier is needed.
  __device__ __forceinline__ void split_off_left(int level) {
    const int half = 1 << level >> 1;
    const float* from = llr_of(level, path_);
    float* to = llr_of(level - 1, path_);
    if (is_active()) {
      for (int i = own_lane(); i < half; i += kWarp) to[i] = boxplus(from[i], from[i + half]);
    }
    __syncwarp();
  }

  // After the left half of the node above, which begins at `first`.
  __device__ __forceinline__ void split_off_right(int level, int first, int origin) {
    const int half = 1 << level;
    const float* from = llr_of(level + 1, origin);
    const std::uint8_t* left = bits_of(level, first, path_);
    float* to = llr_of(level, path_);
    if (!is_active()) return;
    for (int i = own_lane(); i < half; i += kWarp) {
      to[i] = combine(from[i], from[i + half], left[i]);
    }
  }

  // The halves of the node above become its bits. The right one begins at `first`.
  __device__ __forceinline__ int merge(int level, int first, int origin) {
    const int half = 1 << level;
    const std::uint8_t* left = bits_of(level, first - half, origin);
    const std::uint8_t* right = bits_of(level, first, path_);
    std::uint8_t* to = bits_of(level + 1, first - half, path_);
    if (!is_active()) return 0;
    for (int i = own_lane(); i < half; i += kWarp) to[i] = left[i] ^ right[i];
    return shared_.of_left[level][origin];
  }

  // All u are known.
  __device__ __forceinline__ int take(int level, int first) {
    const int n = 1 << level;
    std::uint8_t* bits = bits_of(level, first, path_);
    if (!is_active()) return 0;
    for (int i = 0; i < n; i += kWarp) {
      unpack_bits(transform_word(pack_bits(values_ + first + i, n - i)), bits + i, n - i);
    }
    for (int half = kWarp; half < n; half *= 2) {
      __syncwarp();
      for (int i = own_lane(); i < n / 2; i += kWarp) {
        bits[left_of(i, half)] ^= bits[left_of(i, half) + half];
      }
    }
    __syncwarp();
    if constexpr (paths > 1) {
      const float* llr = llr_of(level, path_);
      float cost = 0.0f;
      for (int i = own_lane(); i < n; i += kWarp) cost += bit_cost(llr[i], bits[i]);
      cost_ += sum_of_warp(cost);
    }
    return path_;
  }

  // None is known.
  __device__ __forceinline__ int decide(int level, int first) {
    const int n = 1 << level, each = n == 1 ? 2 : 4;
    int way = 0, origin = 0;
    if constexpr (paths > 1) {
      if (is_active()) offer_ways(level, each);
      __syncthreads();
      way = choose_way(each * count_);
      count_ = each * count_ < paths ? each * count_ : paths;
      origin = way / each;
    }
    if (!is_active()) return 0;
    const float* llr = llr_of(level, origin);
    std::uint8_t* bits = bits_of(level, first, path_);
    for (int i = own_lane(); i < n; i += kWarp) {
      bool bit = llr[i] < 0.0f;
      if constexpr (paths > 1) {
        for (int k = 0; k < 2; ++k) bit ^= i == shared_.weak[origin][k] && way % each >> k & 1;
      }
      bits[i] = bit;
    }
    return origin;
  }

  // A path's four ways, or two if there is one bit: bit k of the way's number turns weak bit k over.
  __device__ __forceinline__ void offer_ways(int level, int each) {
    const int n = 1 << level;
    const float* llr = llr_of(level, path_);
    const int first = weakest(llr, n, -1), second = n == 1 ? 0 : weakest(llr, n, first);
    float certain = 0.0f;
    for (int i = own_lane(); i < n; i += kWarp) certain += soft_margin(magnitude(llr[i]));
    const float base = cost_ + sum_of_warp(certain);
    if (own_lane() != 0) return;
    shared_.weak[path_][0] = first;
    shared_.weak[path_][1] = second;
    float* ways = shared_.cost + each * path_;
    ways[0] = base;
    ways[1] = base + magnitude(llr[first]);
    if (each == 2) return;
    ways[2] = base + magnitude(llr[second]);
    ways[3] = ways[1] + magnitude(llr[second]);
  }

  // The way that this warp's path goes, the path_-th cheapest of so many; sets its cost. Collective.
  __device__ __forceinline__ int choose_way(int count) {
    const int own = own_lane();
    int rank = 0;
    for (int way = 0; way < count && own < count; ++way) {
      const float cost = shared_.cost[way], other = shared_.cost[own];
      rank += cost < other || (cost == other && way < own);
    }
    const auto way_of = [=](int wanted) {
      return __popc(__ballot_sync(kAllLanes, own < count && rank == wanted) - 1);
    };
    const int best = way_of(0), way = way_of(path_ < count ? path_ : 0);
    cost_ = shared_.cost[way] - shared_.cost[best];
    return way;
  }

  __device__ __forceinline__ void write_likeliest() {
    if (own_lane() == 0 && is_active()) shared_.cost[path_] = cost_;
    __syncthreads();
    int best = 0;
    for (int p = 1; p < count_; ++p) best = shared_.cost[p] < shared_.cost[best] ? p : best;
    const std::uint8_t* bits = bits_of(root_, 0, best);
    for (int i = static_cast<int>(threadIdx.x); i < 1 << root_; i += paths * kWarp) {
      decoded_[i] = bits[i];
    }
  }

  PolarShared<paths>& shared_;
  float* clean_;
  std::uint8_t *lefts_, *decoded_;
  const std::uint8_t* values_;
  int root_, path_, count_ = 1;
  float cost_ = 0.0f;
};

template <int paths>
__global__ void __launch_bounds__(paths* kWarp) polar_decode_kernel(PolarDecodeArgs args) {
  COMMRT_SHARED_FLOATS(shared);
  PolarDecoder<paths>(args, *reinterpret_cast<PolarShared<paths>*>(shared)).run();
}

}  // namespace commrt::cuda
