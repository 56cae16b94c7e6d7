// What the ops take, on every device: plain pointers, whole tensors or windows of whole blocks.
// Each op has the same name in commrt/ops/reference, which is its specification.
#pragma once

#include <cstdint>

#include "math/float_bits.h"

// Internal linkage, for the reason given in float_bits.h.
#define COMMRT_HOST static inline __attribute__((always_inline, unused))

namespace commrt {

// How a block of elements becomes codes and a scale.
struct BlockFormat {
  int bits;          // 1, 2, 4 or 8
  int block;         // elements that share a scale: 32 .. 1024, a power of two
  bool mean_levels;  // levels set by the block's mean magnitude instead of its maximum
};

// `num_blocks` consecutive blocks inside a payload: codes and scales lie in separate regions.
struct PayloadSlice {
  std::uint8_t* codes;
  std::uint16_t* scales;
};

// A window of a flat tensor that begins at a block boundary; the last block may be cut short.
struct Window {
  void* data;
  DType dtype;
  std::int64_t numel;
  std::uint64_t first_index;  // index in the whole tensor of the window's first element
};

COMMRT_HD std::int64_t code_bytes(int bits, int block) {
  return static_cast<std::int64_t>(bits) * block / 8;
}

// Elements that the window has of a block.
COMMRT_HD int valid_in_block(const Window& window, int block, std::int64_t index) {
  const std::int64_t left = window.numel - index * block;
  return static_cast<int>(left < block ? left : block);
}

struct Rounding {
  bool stochastic;
  std::uint64_t seed;
};

// Equal slices of the payloads of several ranks, `stride` bytes apart.
struct PayloadStack {
  const std::uint8_t* codes;
  const std::uint16_t* scales;
  std::int64_t stride;
  int count;
};

struct BlockEncodeArgs {
  Window input;
  PayloadSlice payload;
  BlockFormat format;
  Rounding rounding;
};

struct LocoEncodeArgs {
  Window grad;
  PayloadSlice residual;
  PayloadSlice payload;
  BlockFormat format;
  Rounding rounding;
  float beta;
  int residual_bits;  // 8 (rounded to nearest) or 4 (stochastic)
};

struct BlockDecodeArgs {
  PayloadSlice payload;
  Window output;
  BlockFormat format;
};

struct DecodeAverageArgs {
  PayloadStack payloads;
  Window output;
  BlockFormat format;
};

struct DecodeAverageEncodeArgs {
  PayloadStack payloads;
  BlockFormat format;
  PayloadSlice output;
  BlockFormat output_format;
};

// Scales of whole payloads; `ratio` lies where they do.
struct RescaleArgs {
  std::uint16_t* scales;
  const float* ratio;
  int bits;
};

// What makes `after` of `before`: elements of two or four bytes, of which only bits count.
struct PatchEncodeArgs {
  const void* after;
  const void* before;
  int element_size;
  std::int64_t numel;
  std::uint8_t* payload;
};

struct PatchApplyArgs {
  void* weights;
  int element_size;
  std::int64_t numel;
  const std::uint8_t* payload;  // at a multiple of four
  std::int64_t payload_bytes;
};

// Call body.template operator()<bits>() for the run-time number of bits.
template <typename Body>
COMMRT_HOST void with_bits(int bits, Body body) {
  switch (bits) {
    case 1: return body.template operator()<1>();
    case 2: return body.template operator()<2>();
    case 4: return body.template operator()<4>();
    default: return body.template operator()<8>();
  }
}

template <typename Body>
COMMRT_HOST void with_dtype(DType dtype, Body body) {
  switch (dtype) {
    case DType::kBFloat16: return body.template operator()<DType::kBFloat16>();
    case DType::kFloat16: return body.template operator()<DType::kFloat16>();
    default: return body.template operator()<DType::kFloat32>();
  }
}

template <typename Body>
COMMRT_HOST auto with_element_size(int size, Body body) {
  return size == 4 ? body.template operator()<4>() : body.template operator()<2>();
}

}  // namespace commrt
