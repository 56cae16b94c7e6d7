// What the polar ops take, on every device; commrt/ops/polar.py tells what they do.
// Each op has the same name in commrt/ops/reference, which is its specification.
#pragma once

#include "ops.h"

namespace commrt {

constexpr int kCosetTile = 1024;  // elements, the units in which a CPU's kernels are given work

// Blocks of 2^log2_size bits, a byte each.
struct PolarTransformArgs {
  std::uint8_t* bits;
  std::int64_t num_blocks;
  int log2_size;
};

struct PolarDecodeArgs {
  const float* llr;
  const std::uint8_t* known;
  std::int64_t known_stride;  // from a block's to the next one's; 0 if all have the same
  const std::uint8_t* values;
  std::uint8_t* bits;
  float* scratch;  // polar_scratch() elements a block
  std::int64_t num_blocks;
  int log2_size;
  int paths;
};

struct CosetLlrArgs {
  const float* position;
  const std::int16_t* known;
  float inverse_place;
  const float* table;
  int table_size;
  float* llr;
  std::int64_t numel;
};

struct CosetDecodeArgs {
  const float* position;
  const std::int16_t* residues;
  float modulus, inverse_modulus;
  std::int16_t* codes;
  std::int64_t numel;
};

// A block's scratch: its LLRs, and for each path those of a node on every level. With several paths,
// also the bits of left halves on every level, and those of the whole block.
COMMRT_HD std::int64_t polar_scratch(int log2_size, int paths) {
  return static_cast<std::int64_t>(1 + paths + paths / 2) << log2_size;
}

// Call body.template operator()<paths>() for the run-time number of paths.
template <typename Body>
COMMRT_HOST void with_paths(int paths, Body body) {
  switch (paths) {
    case 1: return body.template operator()<1>();
    case 2: return body.template operator()<2>();
    case 4: return body.template operator()<4>();
    default: return body.template operator()<8>();
  }
}

}  // namespace commrt
