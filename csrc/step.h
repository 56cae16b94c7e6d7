// What the optimizer steps take, on every device: a list of tensors, each a matrix in one piece.
// Each step has the same name in commrt/ops/reference, which is its specification.
#pragma once

#include "math/float_bits.h"
#include "math/philox.h"

namespace commrt {

// Elements of a row that share the scale of an 8-bit moment, and whose squares are summed in fp32.
constexpr int kSegment = 256;
constexpr int kMaxMoments = 4;

enum class MomentFormat : int {
  kFloat32 = 0,
  kBFloat16 = 1,
  kLinear8 = 2,  // scale * code
  kSquare8 = 3,  // scale * code * |code|: finer towards zero
  kFourth8 = 4,  // scale * (code + 128)^4: no sign, and never rounded to zero
};

// How a step's moments are stored: a rule says which format that is for each of them.
enum class Storage : int { kFloat32 = 0, kBFloat16 = 1, kEightBits = 2 };

// A moment of every element; with 8 bits `scales` has one fp32 number a segment of a row.
struct Moment {
  void* values;
  float* scales;
};

enum class WeightFormat : int {
  kFloat32 = 0,     // in place
  kMaster = 1,      // fp32 in `extra`, rounded into the weights
  kResidual = 2,    // bfloat16, and the eight bits that follow in `extra`
  kStochastic = 3,  // bfloat16, rounded by random numbers
};

// Where adam_mini's second moments come from.
enum class Second : int {
  kUpdated = 0,  // one a row, updated from the gradient
  kOfRow = 1,    // one a row, final
  kOfColumn = 2  // one a column, final
};

// A matrix of a weight, or of a part of one.
struct StepTensor {
  const void* grad;
  DType grad_dtype;
  void* weights;
  DType weight_dtype;
  void* extra;
  WeightFormat weight_format;
  std::int64_t rows;
  std::int64_t cols;
  Moment moments[kMaxMoments];
  Storage storage;
  bool stochastic;  // round the first moment by random numbers
  // Random numbers of element (i, j) are those of index first_index + i * index_stride + j.
  std::uint64_t seed;
  std::uint64_t first_index;
  std::uint64_t index_stride;
  float* second;  // of adam_mini; of mofo, the one threshold
  // adam_mini only
  Second second_from;
  std::int64_t block_rows;  // rows that share a second moment
};

COMMRT_HD std::int64_t segments_per_row(const StepTensor& tensor) {
  return (tensor.cols + kSegment - 1) / kSegment;
}

// Coefficients, with bias corrections and the learning rate in them.
struct StepOptions {
  float beta1, beta2, beta3;
  float eps;
  float decay;               // the weights are multiplied by it
  float step_size;           // lr / (1 - beta1^t)
  float difference_size;     // Adan: lr * beta2 / (1 - beta2^t),
  float has_before;          // and 0 in its first step, else 1
  float root_correction;     // sqrt(1 - beta2^t), of Adan's beta3
  float grad_scale;          // the gradient is multiplied by this,
  const float* grad_factor;  // and by this where it is not null
};

// The tensors of one step as one list of units of work: tensor i has the units from first_unit[i] to
// first_unit[i + 1].
struct StepList {
  const StepTensor* tensors;
  const std::int64_t* first_unit;
  int count;
  StepOptions options;
};

COMMRT_HD float grad_multiplier(const StepOptions& options) {
  if (options.grad_factor == nullptr) return options.grad_scale;
  return options.grad_scale * *options.grad_factor;
}

// A matrix whose squares are summed by row or by column, into one number for each.
struct SquaresTensor {
  const void* grad;
  DType grad_dtype;
  std::int64_t rows;
  std::int64_t cols;
  double* sums;
  bool by_column;
};

struct SquaresList {
  const SquaresTensor* tensors;
  const std::int64_t* first_unit;
  int count;
};

// Rows that a unit of work has, so that it is worth a thread's while; segments where a rule knows no
// rows.
constexpr std::int64_t kUnitElements = 32 * 1024;

COMMRT_HD std::int64_t rows_per_unit(std::int64_t cols, std::int64_t multiple) {
  const std::int64_t blocks = kUnitElements / (cols * multiple > 0 ? cols * multiple : 1);
  return (blocks > 1 ? blocks : 1) * multiple;
}

}  // namespace commrt
