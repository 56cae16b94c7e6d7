// What the ops of the dither take, on every device; commrt/ops/dither.py tells what they do.
// Each op has the same name in commrt/ops/reference, which is its specification.
#pragma once

#include "groups.h"

namespace commrt {

enum class Lattice : int { kZ = 0, kE8 = 1 };

constexpr std::int16_t kNanCode = -32768;
constexpr int kMaxClasses = 64;
constexpr int kDitherTile = 1024;  // elements, the units in which a CPU's kernels are given work

// What the elements of a window share with those who have the same seed.
struct Dither {
  Lattice lattice;
  std::uint64_t seed;
  std::uint64_t first_index;  // in the whole tensor; of kE8 a multiple of eight, as is the size
};

struct DitherQuantiseArgs {
  const float* values;
  const float* predicted;  // or null: zeros
  std::int16_t* codes;
  std::int64_t numel;
  float step;
  Dither dither;
};

struct DitherDequantiseArgs {
  const std::int16_t* codes;
  const float* predicted;  // or null: zeros
  float* values;
  std::int64_t numel;
  float step;
  Dither dither;
};

struct ScaleRowsArgs {
  const float* energies;              // or null: zeros
  const std::int16_t* rows_of_class;  // of each group
  int num_classes;                    // 1 .. kMaxClasses
  Groups groups;
  int base;
  std::int16_t* contexts;  // or null
  std::int16_t* rows;
  std::int64_t numel;
  Dither dither;
};

// Rows of a stack lie `stride` elements apart.
struct LmmseCombineArgs {
  const float* stack;
  std::int64_t stride;
  int count;
  const float* weights;
  float* out;
  std::int64_t numel;
};

// Call body.template operator()<lattice>() for the run-time lattice.
template <typename Body>
COMMRT_HOST void with_lattice(Lattice lattice, Body body) {
  if (lattice == Lattice::kE8) return body.template operator()<Lattice::kE8>();
  body.template operator()<Lattice::kZ>();
}

}  // namespace commrt
