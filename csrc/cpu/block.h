// What the ops share: a block's elements, its scale, its codes.
//
// The encoders work on tiles of a few blocks in first-level cache, each phase over the whole tile: the
// reductions and divisions of one block then hide behind the work on the others.
#pragma once

#include <cstring>

#include "../math/scale.h"
#include "ops.h"
#include "simd.h"

namespace commrt::COMMRT_ISA {

constexpr int kTileElements = 1024;  // at least the largest block
constexpr int kMaxTileBlocks = kTileElements / 32;
constexpr int kPrefetchBytes = 4096;  // ahead of the block in hand; measured, see bench/results

struct alignas(64) TileBuffer {
  float value[kTileElements + kUniformSlack];
};

COMMRT_INLINE std::int64_t code_bytes(int bits, int block) {
  return static_cast<std::int64_t>(bits) * block / 8;
}

COMMRT_INLINE int valid_in_block(const Window& window, int block, std::int64_t index) {
  const std::int64_t left = window.numel - index * block;
  return static_cast<int>(left < block ? left : block);
}

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

// The uniform numbers of a block of the window.
COMMRT_INLINE const float* draw(TileBuffer& draws, std::uint64_t seed, Stream stream,
                                const Window& window, int block, std::int64_t index) {
  const std::uint64_t first = window.first_index + static_cast<std::uint64_t>(index * block);
  fill_uniform(draws.value, block, seed, stream, first);
  return draws.value;
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
  for (int i = 0; i < block; i += kLanes) {
    total = add(total, as_floats(abs_bits(load<DType::kFloat32>(value + i))));
  }
  const float mean = sum_lanes(total) / static_cast<float>(valid);
  if (bits == 1) return mean;
  const Vf threshold = broadcast(0.7f * mean);
  Vf sum = broadcast(0.0f), count = broadcast(0.0f);
  for (int i = 0; i < block; i += kLanes) {
    const Vf magnitude = as_floats(abs_bits(load<DType::kFloat32>(value + i)));
    sum = add(sum, where_greater(magnitude, threshold, magnitude));
    count = add(count, where_greater(magnitude, threshold, broadcast(1.0f)));
  }
  const float survivors = sum_lanes(count);
  return survivors > 0.0f ? sum_lanes(sum) / survivors : absmax;
}

COMMRT_INLINE std::uint16_t choose_scale(const float* value, int valid, std::uint32_t absmax_bits,
                                         const BlockFormat& format) {
  if (!is_finite_magnitude(absmax_bits)) return kScaleNaN;
  const float absmax = bits_to_float(absmax_bits);
  if (!format.mean_levels) return scale_from_absmax(absmax, format.bits);
  const float level = mean_level(value, format.block, valid, format.bits, absmax);
  return scale_from_level(level, format.bits);
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

COMMRT_INLINE void zero_codes(std::uint8_t* codes, int bits, int block) {
  std::memset(codes, 0, static_cast<std::size_t>(code_bytes(bits, block)));
}

// 1 / scale; zero, which makes every code zero, where the scale is zero.
COMMRT_INLINE float inverse_of(std::uint16_t scale) {
  return scale == 0 ? 0.0f : 1.0f / bf16_to_float(scale);
}

// Codes of `block` values under `scale`.
template <int bits>
COMMRT_INLINE void encode_values(const float* value, int block, std::uint16_t scale,
                                 const float* uniform, std::uint8_t* codes) {
  if (scale == kScaleNaN || (bits == 1 && scale == 0)) return zero_codes(codes, bits, block);
  const Vf inverse = broadcast(inverse_of(scale));
  for (int i = 0; i < block; i += kLanes) {
    const float* draws = uniform == nullptr ? nullptr : uniform + i;
    const Vf level = to_level<bits>(load<DType::kFloat32>(value + i), inverse, draws);
    store_codes<bits>(codes + i * bits / 8, level);
  }
}

// Call body.template operator()<bits>() for the run-time number of bits.
template <typename Body>
COMMRT_INLINE void with_bits(int bits, Body body) {
  switch (bits) {
    case 1: return body.template operator()<1>();
    case 2: return body.template operator()<2>();
    case 4: return body.template operator()<4>();
    default: return body.template operator()<8>();
  }
}

template <typename Body>
COMMRT_INLINE void with_dtype(DType dtype, Body body) {
  switch (dtype) {
    case DType::kBFloat16: return body.template operator()<DType::kBFloat16>();
    case DType::kFloat16: return body.template operator()<DType::kFloat16>();
    default: return body.template operator()<DType::kFloat32>();
  }
}

// Let produce(sink) write the block by calling sink(element, sixteen values) for all of it; whole and
// aligned blocks go past the caches.
template <DType dtype, typename Produce>
COMMRT_INLINE void write_block(const Window& window, int block, std::int64_t index,
                               Produce produce) {
  constexpr std::int64_t size = element_size(dtype);
  auto* to = static_cast<std::uint8_t*>(window.data) + index * block * size;
  const int valid = valid_in_block(window, block, index);
  if (valid == block && reinterpret_cast<std::uintptr_t>(to) % (kLanes * size) == 0) {
    produce([=](int i, Vf x) COMMRT_INLINE_LAMBDA { stream<dtype>(to + i * size, x); });
  } else if (valid == block) {
    produce([=](int i, Vf x) COMMRT_INLINE_LAMBDA { store<dtype>(to + i * size, x); });
  } else {
    TileBuffer whole;
    auto* bytes = reinterpret_cast<std::uint8_t*>(whole.value);
    produce([=](int i, Vf x) COMMRT_INLINE_LAMBDA { store<dtype>(bytes + i * size, x); });
    std::memcpy(to, bytes, static_cast<std::size_t>(valid * size));
  }
}

}  // namespace commrt::COMMRT_ISA
