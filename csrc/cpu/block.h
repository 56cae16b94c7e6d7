// What the ops share: a block's elements, its scale, its codes.
//
// The encoders work on tiles of a few blocks in first-level cache, each phase over the whole tile: the
// reductions and divisions of one block then hide behind the work on the others.
#pragma once

#include <cstring>

#include "../math/scale.h"
#include "../ops.h"
#include "simd.h"

namespace commrt::COMMRT_ISA {

constexpr int kTileElements = 1024;  // at least the largest block
constexpr int kMaxTileBlocks = kTileElements / 32;
constexpr int kPrefetchBytes = 8192;  // ahead of the block in hand; measured, see bench/results

struct alignas(64) TileBuffer {
  float value[kTileElements + kUniformSlack];
};

// The elements of a block: in place, or copied and padded with zeros where the tensor ends early.
template <DType dtype>
COMMRT_INLINE const std::uint8_t* block_input(const Window& window, int block, std::int64_t index,
                                              TileBuffer& padded) {
  constexpr std::int64_t size = element_size(dtype);
  const auto* from = static_cast<const std::uint8_t*>(window.data) + index * block * size;
  const int valid = valid_in_block(window, block, index);
  if (valid == block) return from;
  std::memset(padded.value, 0, static_cast<std::size_t>(block * size));
  std::memcpy(padded.value, from, static_cast<std::size_t>(valid * size));
  return reinterpret_cast<const std::uint8_t*>(padded.value);
}

// Call body(first block, number of blocks) for each tile of blocks [begin, end).
template <typename Body>
COMMRT_INLINE void for_each_tile(int block, std::int64_t begin, std::int64_t end, Body body) {
  const std::int64_t per_tile = kTileElements / block;
  for (std::int64_t first = begin; first < end; first += per_tile) {
    body(first, static_cast<int>(end - first < per_tile ? end - first : per_tile));
  }
}

// Mean of the magnitudes above 0.7 times their mean, the level of ternary weight networks (Li and
// Liu, 2016, eq. 6); at one bit the mean of all, the optimal level of a sign (XNOR-Net, eq. 6).
COMMRT_INLINE float mean_level(const float* value, int block, int valid, int bits, float absmax) {
  Vf total = broadcast(0.0f);
  COMMRT_UNROLL
  for (int i = 0; i < block; i += kLanes) {
    total = add(total, as_floats(abs_bits(load<DType::kFloat32>(value + i))));
  }
  const float mean = sum_lanes(total) / static_cast<float>(valid);
  if (bits == 1) return mean;
  const Vf threshold = broadcast(0.7f * mean);
  Vf sum = broadcast(0.0f), count = broadcast(0.0f);
  COMMRT_UNROLL
  for (int i = 0; i < block; i += kLanes) {
    const Vf magnitude = as_floats(abs_bits(load<DType::kFloat32>(value + i)));
    sum = add(sum, where_greater(magnitude, threshold, magnitude));
    count = add(count, where_greater(magnitude, threshold, broadcast(1.0f)));
  }
  const float survivors = sum_lanes(count);
  return survivors > 0.0f ? sum_lanes(sum) / survivors : absmax;
}

// Scales and their inverses of a tile's blocks, from their maxima; this loop is vectorised.
struct TileScales {
  std::uint16_t scale[kMaxTileBlocks];
  float inverse[kMaxTileBlocks];

  COMMRT_MEMBER void from_absmax(const std::uint32_t* absmax_bits, int count, int bits) {
    for (int b = 0; b < count; ++b) {
      scale[b] = scale_from_absmax(absmax_bits[b], bits);
      inverse[b] = inverse_scale(scale[b]);
    }
  }
};

// As the format says: from the maxima, or from the means of the finite blocks.
COMMRT_INLINE TileScales choose_scales(const float* value, const std::uint32_t* absmax_bits,
                                       int count, const BlockFormat& format, const Window* window,
                                       std::int64_t first) {
  TileScales scales;
  scales.from_absmax(absmax_bits, count, format.bits);
  if (!format.mean_levels) return scales;
  for (int b = 0; b < count; ++b) {
    if (scales.scale[b] == kScaleNaN) continue;
    const int valid =
        window == nullptr ? format.block : valid_in_block(*window, format.block, first + b);
    const float level = mean_level(value + b * format.block, format.block, valid, format.bits,
                                   bits_to_float(absmax_bits[b]));
    scales.scale[b] = scale_from_level(level, format.bits);
    scales.inverse[b] = inverse_scale(scales.scale[b]);
  }
  return scales;
}

// value / scale, rounded by the uniform numbers, or unrounded where `uniform` is null.
//
// Scales from the maximum are rounded up, so rounding to nearest cannot exceed the largest code; only
// the other cases clamp.
template <int bits>
COMMRT_INLINE Vf to_level(Vf value, Vf inverse_scale, const float* uniform) {
  if constexpr (bits == 1) return sign_of(value);
  const auto limit = static_cast<float>(max_code(bits));
  Vf level = mul(value, inverse_scale);
  if constexpr (bits == 2) level = clamp(level, limit);
  if (uniform == nullptr) return level;
  level = clamp(level, limit);
  const Vf below = floor(level);
  const Vf fraction = sub(level, below);
  return add(below, where_greater(fraction, load<DType::kFloat32>(uniform), broadcast(1.0f)));
}

template <int bits>
COMMRT_INLINE Group to_levels(Group values, Vf inverse_scale, const float* uniform) {
  const float* later = uniform == nullptr ? nullptr : uniform + kLanes;
  return {to_level<bits>(values.first, inverse_scale, uniform),
          to_level<bits>(values.second, inverse_scale, later)};
}

COMMRT_INLINE Group load_group(const float* from) {
  return {load<DType::kFloat32>(from), load<DType::kFloat32>(from + kLanes)};
}

COMMRT_INLINE void store_group(float* to, Group values) {
  store<DType::kFloat32>(to, values.first);
  store<DType::kFloat32>(to + kLanes, values.second);
}

COMMRT_INLINE void zero_codes(std::uint8_t* codes, int bits, int block) {
  std::memset(codes, 0, static_cast<std::size_t>(code_bytes(bits, block)));
}

// How the codes of a tile are rounded: to nearest even, or by the uniform numbers of its elements.
struct TileRounding {
  bool stochastic;
  std::uint64_t seed;
  Stream stream;
  std::uint64_t first_index;  // of the tile's first element, in the whole tensor

  // The uniform numbers of a block, or null.
  COMMRT_MEMBER const float* draw(TileBuffer& draws, int block, int b) const {
    if (!stochastic) return nullptr;
    fill_uniform(draws.value, block, seed, stream, first_index + static_cast<unsigned>(b * block));
    return draws.value;
  }
};

COMMRT_INLINE TileRounding tile_rounding(const Rounding& rounding, Stream stream,
                                         const Window& window, int block, std::int64_t first) {
  const std::uint64_t first_index = window.first_index + static_cast<std::uint64_t>(first * block);
  return {rounding.stochastic, rounding.seed, stream, first_index};
}

constexpr TileRounding kNearest = {false, 0, Stream::kCodes, 0};

// Codes of one block.
template <int bits>
COMMRT_INLINE void encode_block(const float* value, int block, std::uint16_t scale,
                                float inverse_scale, const float* uniform, std::uint8_t* codes) {
  if (scale == kScaleNaN || (bits == 1 && scale == 0)) return zero_codes(codes, bits, block);
  const Vf inverse = broadcast(inverse_scale);
  COMMRT_UNROLL
  for (int i = 0; i < block; i += kGroup) {
    const Group values = load_group(value + i);
    store_codes<bits>(codes + i * bits / 8,
                      to_levels<bits>(values, inverse, uniform == nullptr ? nullptr : uniform + i));
  }
}

// Codes and scales of a tile whose first block is block `first` of the payload.
template <int bits>
COMMRT_PHASE void encode_tile(const float* value, int block, int count, const TileScales& scales,
                              const TileRounding& rounding, const PayloadSlice& payload,
                              std::int64_t first) {
  TileBuffer draws;
  for (int b = 0; b < count; ++b) {
    payload.scales[first + b] = scales.scale[b];
    encode_block<bits>(value + b * block, block, scales.scale[b], scales.inverse[b],
                       rounding.draw(draws, block, b),
                       payload.codes + (first + b) * code_bytes(bits, block));
  }
}

// Let produce(sink) write the block by calling sink(element, sixteen values) for all of it; whole and
// aligned blocks go past the caches.
template <DType dtype, typename Produce>
COMMRT_INLINE void write_block(const Window& window, int block, std::int64_t index,
                               Produce produce) {
  constexpr std::int64_t size = element_size(dtype);
  auto* output = static_cast<std::uint8_t*>(window.data) + index * block * size;
  const int valid = valid_in_block(window, block, index);
  TileBuffer padded;
  const bool is_whole = valid == block;
  std::uint8_t* to = is_whole ? output : reinterpret_cast<std::uint8_t*>(padded.value);
  const bool past_caches = is_whole && reinterpret_cast<std::uintptr_t>(to) % (kLanes * size) == 0;
  produce([=](int i, Vf x) COMMRT_INLINE_LAMBDA {
    if (past_caches) return stream<dtype>(to + i * size, x);
    store<dtype>(to + i * size, x);
  });
  if (!is_whole) std::memcpy(output, to, static_cast<std::size_t>(valid * size));
}

}  // namespace commrt::COMMRT_ISA
