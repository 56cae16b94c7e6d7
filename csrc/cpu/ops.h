// The ops as the bindings see them: plain pointers, whole tensors or windows of whole blocks.
// Each has the same name in commrt/ops/reference.py, which is its specification.
#pragma once

#include <cstdint>

#include "../math/float_bits.h"

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

// Kernels of one instruction set; each works on blocks [begin, end).
struct Kernels {
  const char* isa;
  void (*block_encode)(const BlockEncodeArgs&, std::int64_t begin, std::int64_t end);
  void (*block_decode)(const BlockDecodeArgs&, std::int64_t begin, std::int64_t end);
  void (*loco_encode)(const LocoEncodeArgs&, std::int64_t begin, std::int64_t end);
  void (*decode_average)(const DecodeAverageArgs&, std::int64_t begin, std::int64_t end);
  void (*decode_average_encode)(const DecodeAverageEncodeArgs&, std::int64_t begin,
                                std::int64_t end);
  void (*copy_stream)(const float* from, float* to, std::int64_t numel);
  float (*read)(const float* from, std::int64_t numel);
};

}  // namespace commrt
