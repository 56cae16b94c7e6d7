// What the ops on sources take; commrt/ops/sources.py tells what they do. They run on the CPU only.
// Each op has the same name in commrt/ops/reference, which is its specification.
#pragma once

#include "groups.h"

namespace commrt {

constexpr int kEnergyBits = 34;
constexpr float kLeastEnergy = 0x1p-100f, kMostEnergy = 0x1p100f;
constexpr float kMostPredicted = 0x1p64f;
constexpr int kNumProducts = 6;
constexpr int kSourceTile = 1024;  // elements, the units in which kernels are given work

struct Source {
  const void* values;  // or null: zeros
  DType dtype;         // kFloat32 or kBFloat16
};

struct Matrix {
  std::int64_t begin, rows, cols;
};

// A unit is a matrix.
struct SourceEnergiesArgs {
  Source previous, own;
  float previous_weight;
  const Matrix* matrices;
  float* energies;
};

// Scratch for the largest of the matrices.
struct EnergySums {
  std::int64_t* of_row;
  std::int64_t* of_col;
  float* col;
};

// A unit is a tile.
struct SourcePredictionArgs {
  Source previous, own;
  const float* weights;  // two of each group
  Groups groups;
  float* predicted;
  std::int64_t numel;
};

// A unit is a group.
struct SourceProductsArgs {
  const float* update;
  Source previous, own;
  Groups groups;
  double* products;  // kNumProducts of each group
  std::int64_t numel;
};

// A unit is a tile.
struct SourceHistoryArgs {
  const float* decoded;
  const float* predicted;
  const std::int16_t* rows;
  const float* shares;
  int num_shares;  // a power of two
  std::uint16_t* kept;
  std::int64_t numel;
};

// A unit is a tile. Updates lie `stride` elements apart.
struct UpdateAddArgs {
  const float* updates;
  std::int64_t stride;
  const double* factors;
  std::int64_t count;
  double* total;
  std::int64_t numel;
};

}  // namespace commrt
