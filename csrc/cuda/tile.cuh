// How warps share the blocks of a window, and what the lanes of a block do together.
//
// A lane has eight consecutive elements of each row of 256, which a warp reads at once. Blocks of up
// to 256 elements share a row; one of 512 or 1024 takes several rows of its warp, `rows` of them.
// Every lane of a warp comes to every collective, also those whose block does not exist.
#pragma once

#include "../math/philox.h"
#include "../math/quantise.h"
#include "memory.cuh"

namespace commrt::cuda {

constexpr int kWarp = 32;
constexpr int kRow = kWarp * kPerLane;
constexpr int kWarps = 8;  // of a thread block
constexpr int kThreads = kWarps * kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kSumLanes = 16;  // of a block's sums, see commrt/ops/reference.py

constexpr int rows_of(int block) { return block <= kRow ? 1 : block / kRow; }

// Where this lane works.
template <int rows>
struct Place {
  int lanes;           // of its block
  int lane;            // among them
  std::int64_t block;  // counted from the window's first
  std::int64_t first;  // element of the first row, counted likewise
  bool is_block;       // whether there is such a block

  __device__ __forceinline__ Place(int block_size, std::int64_t num_blocks) {
    const int warp_lane = static_cast<int>(threadIdx.x) % kWarp;
    const std::int64_t warp = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
    lanes = rows == 1 ? block_size / kPerLane : kWarp;
    lane = warp_lane & (lanes - 1);
    first = warp * (kRow * rows) + warp_lane * kPerLane;
    block = rows == 1 ? warp * (kWarp / lanes) + warp_lane / lanes : warp;
    is_block = block < num_blocks;
  }

  __device__ __forceinline__ std::int64_t element(int row) const { return first + row * kRow; }
  __device__ __forceinline__ int element_of_block(int row) const {
    return row * kRow + lane * kPerLane;
  }
  __device__ __forceinline__ int block_size() const {
    return rows == 1 ? lanes * kPerLane : rows * kRow;
  }
  __device__ __forceinline__ bool is_leader() const { return is_block && lane == 0; }
};

// The part of the shared memory in which this warp sums.
template <int rows>
__device__ __forceinline__ float* staged_by_warp() {
  COMMRT_SHARED_FLOATS(shared);
  return shared + threadIdx.x / kWarp * (kRow * rows);
}

// -- over the lanes of a block --------------------------------------------------------------------

__device__ __forceinline__ std::uint32_t max_over(int lanes, std::uint32_t x) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    const std::uint32_t other = __shfl_xor_sync(kAllLanes, x, distance);
    x = other > x ? other : x;
  }
  return x;
}

__device__ __forceinline__ int sum_over(int lanes, int x) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, distance);
  }
  return x;
}

template <int rows>
__device__ __forceinline__ std::uint32_t block_absmax(const Place<rows>& place,
                                                      const float (&x)[rows][kPerLane]) {
  std::uint32_t most = 0;
#pragma unroll
  for (int row = 0; row < rows; ++row) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const std::uint32_t magnitude = float_to_bits(x[row][i]) & 0x7fffffffu;
      most = magnitude > most ? magnitude : most;
    }
  }
  return max_over(place.lanes, most);
}

// The block's sum in the order that is part of the format: every sixteenth element, one after the
// other, then these sixteen sums pairwise. `staged` is the warp's part of the shared memory.
template <int rows>
__device__ __forceinline__ float block_sum(const Place<rows>& place, float* staged,
                                           const float (&x)[rows][kPerLane]) {
  const int warp_lane = static_cast<int>(threadIdx.x) % kWarp;
  float* own = staged + (warp_lane - place.lane) * kPerLane;
  __syncwarp();  // after those who still read what was staged before
#pragma unroll
  for (int row = 0; row < rows; ++row) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) own[place.element_of_block(row) + i] = x[row][i];
  }
  __syncwarp();
  const auto column = [=](int first) {
    float sum = 0.0f;
    for (int i = first; i < place.block_size(); i += kSumLanes) sum += own[i];
    return sum;
  };
  float sum;
  if (place.lanes >= 16) {
    sum = column(place.lane % 16);
    sum += __shfl_xor_sync(kAllLanes, sum, 8);
    sum += __shfl_xor_sync(kAllLanes, sum, 4);
  } else if (place.lanes == 8) {
    sum = column(place.lane) + column(place.lane + 8);
    sum += __shfl_xor_sync(kAllLanes, sum, 4);
  } else {
    sum = (column(place.lane) + column(place.lane + 8)) +
          (column(place.lane + 4) + column(place.lane + 12));
  }
  sum += __shfl_xor_sync(kAllLanes, sum, 2);
  return sum + __shfl_xor_sync(kAllLanes, sum, 1);
}

// See mean_level() in csrc/cpu/block.h.
template <int rows>
__device__ __forceinline__ float mean_level(const Place<rows>& place, float* staged, int valid,
                                            int bits, std::uint32_t absmax_bits,
                                            const float (&x)[rows][kPerLane]) {
  float magnitude[rows][kPerLane];
#pragma unroll
  for (int row = 0; row < rows; ++row) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      magnitude[row][i] = bits_to_float(float_to_bits(x[row][i]) & 0x7fffffffu);
    }
  }
  const float mean = block_sum(place, staged, magnitude) / static_cast<float>(valid);
  if (bits == 1) return mean;
  const float threshold = 0.7f * mean;
  int count = 0;
#pragma unroll
  for (int row = 0; row < rows; ++row) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const bool is_above = magnitude[row][i] > threshold;
      count += is_above;
      if (!is_above) magnitude[row][i] = 0.0f;
    }
  }
  count = sum_over(place.lanes, count);
  const float sum = block_sum(place, staged, magnitude);
  return count > 0 ? sum / static_cast<float>(count) : bits_to_float(absmax_bits);
}

// As the format says, the same on every lane of the block; `valid` is its number of elements.
template <int rows>
__device__ __forceinline__ std::uint16_t choose_scale(const Place<rows>& place, float* staged,
                                                      const BlockFormat& format, int valid,
                                                      const float (&x)[rows][kPerLane]) {
  const std::uint32_t absmax_bits = block_absmax(place, x);
  const std::uint16_t scale = scale_from_absmax(absmax_bits, format.bits);
  if (!format.mean_levels) return scale;
  const float level = mean_level(place, staged, valid, format.bits, absmax_bits, x);
  return scale == kScaleNaN ? scale : scale_from_level(level, format.bits);
}

// -- codes ----------------------------------------------------------------------------------------

// Where a lane's word lies among the codes of its block. At 4 bits the lanes of a group of 32
// elements have elements 0, 8, 16 and 24, and byte j has those of element j and j + 16: lanes that are
// two apart take four of the eight bytes each.
template <int bits>
__device__ __forceinline__ int word_offset(int element_of_block) {
  if constexpr (bits != 4) return element_of_block / kPerLane * bits;
  const int lane = element_of_block / kPerLane;
  return lane / 4 * 16 + lane % 2 * 8 + lane / 2 % 2 * 4;
}

// Eight codes as a lane stores them. Collective.
template <int bits>
__device__ __forceinline__ std::uint64_t pack(const int (&code)[kPerLane]) {
  if constexpr (bits == 4) {
    std::uint32_t low = 0, high = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      low |= static_cast<std::uint32_t>(code[i] & 15) << 8 * i;
      high |= static_cast<std::uint32_t>(code[i + 4] & 15) << 8 * i;
    }
    const bool is_second = threadIdx.x / 2 % 2;
    const std::uint32_t other = __shfl_xor_sync(kAllLanes, is_second ? low : high, 2);
    return is_second ? other | high << 4 : low | other << 4;
  } else {
    std::uint64_t word = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const unsigned raw = bits == 1 ? code[i] < 0 : code[i] & ((1 << bits) - 1);
      word |= std::uint64_t{raw} << bits * i;
    }
    return word;
  }
}

// The reverse. Collective.
template <int bits>
__device__ __forceinline__ void unpack(std::uint64_t word, float (&code)[kPerLane]) {
  if constexpr (bits == 4) {
    const auto bytes = static_cast<std::uint32_t>(word);
    const std::uint32_t low = bytes & 0x0f0f0f0fu, high = bytes >> 4 & 0x0f0f0f0fu;
    const bool is_second = threadIdx.x / 2 % 2;
    const std::uint32_t other = __shfl_xor_sync(kAllLanes, is_second ? low : high, 2);
    const std::uint32_t begin = is_second ? other : low, end = is_second ? high : other;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      code[i] = static_cast<float>(static_cast<int>((begin >> 8 * i & 15) ^ 8) - 8);
      code[i + 4] = static_cast<float>(static_cast<int>((end >> 8 * i & 15) ^ 8) - 8);
    }
  } else {
    constexpr unsigned sign = 1u << (bits - 1), mask = 2 * sign - 1;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const auto raw = static_cast<unsigned>(word >> bits * i) & mask;
      code[i] = bits == 1
                    ? (raw ? -1.0f : 1.0f)
                    : static_cast<float>(static_cast<int>(raw ^ sign) - static_cast<int>(sign));
    }
  }
}

// Levels of eight elements, whole numbers of which are codes: as they are where rounding is to
// nearest, else rounded. `index` is the first element's in the whole tensor, a multiple of 8.
template <int bits>
__device__ __forceinline__ void to_levels(const float (&x)[kPerLane], float inverse_scale,
                                          const Rounding& rounding, Stream stream,
                                          std::uint64_t index, float (&level)[kPerLane]) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) level[i] = to_level<bits>(x[i], inverse_scale);
  if constexpr (bits > 1) {
    if (!rounding.stochastic) return;
#pragma unroll
    for (int i = 0; i < kPerLane; i += 4) {
      const Philox4 draw = philox(rounding.seed, stream, (index + i) / 4);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        level[i + k] = round_stochastic<bits>(level[i + k], uniform_from_word(draw.word[k]));
      }
    }
  }
}

// Codes of one row of a block; zeros where its scale is NaN, or at 1 bit zero. Collective.
template <int bits, int rows>
__device__ __forceinline__ void store_codes(const Place<rows>& place, int row, std::uint16_t scale,
                                            const float (&level)[kPerLane],
                                            const PayloadSlice& payload) {
  const bool is_coded = scale != kScaleNaN && (bits > 1 || scale != 0);
  int code[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    code[i] = is_coded ? static_cast<int>(round_even(level[i])) : 0;
  }
  const std::uint64_t word = pack<bits>(code);
  if (!place.is_block) return;
  std::uint8_t* codes = payload.codes + place.block * code_bytes(bits, place.block_size());
  store_word<bits>(codes + word_offset<bits>(place.element_of_block(row)), word);
}

// The word of one row of a block, zero where there is no block.
template <int bits, int rows>
__device__ __forceinline__ std::uint64_t load_codes(const Place<rows>& place, int row,
                                                    const std::uint8_t* codes) {
  if (!place.is_block) return 0;
  codes += place.block * code_bytes(bits, place.block_size());
  return load_word<bits>(codes + word_offset<bits>(place.element_of_block(row)));
}

// Codes and scale of a block in registers: what all encoders end with. Collective.
template <int bits, int rows>
__device__ __forceinline__ void encode_block(const Place<rows>& place, std::uint16_t scale,
                                             const Rounding& rounding, Stream stream,
                                             std::uint64_t first_index,
                                             const float (&x)[rows][kPerLane],
                                             const PayloadSlice& payload) {
  const float inverse = inverse_scale(scale);
#pragma unroll
  for (int row = 0; row < rows; ++row) {
    float level[kPerLane];
    to_levels<bits>(x[row], inverse, rounding, stream, first_index + place.element(row), level);
    store_codes<bits>(place, row, scale, level, payload);
  }
  if (place.is_leader()) store_scale(payload.scales + place.block, scale);
}

}  // namespace commrt::cuda
