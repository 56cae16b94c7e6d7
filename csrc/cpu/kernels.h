// The ops for one instruction set; each works on blocks, or units of a list, [begin, end).
#pragma once

#include "../dither.h"
#include "../ops.h"
#include "../polar.h"
#include "../rans.h"
#include "../sources.h"
#include "../step.h"
#include "patch_piece.h"

namespace commrt {

// Every op once: what it returns, its name, and what it takes before the range.
// clang-format off
#define COMMRT_KERNELS(kernel)                                                 \
  kernel(void, block_encode, const BlockEncodeArgs&)                           \
  kernel(void, block_decode, const BlockDecodeArgs&)                           \
  kernel(void, loco_encode, const LocoEncodeArgs&)                             \
  kernel(void, decode_average, const DecodeAverageArgs&)                       \
  kernel(void, decode_average_encode, const DecodeAverageEncodeArgs&)          \
  kernel(void, rescale, const RescaleArgs&)                                    \
  kernel(void, adam_mini, const StepList&)                                     \
  kernel(void, adamw, const StepList&)                                         \
  kernel(void, mofo, const StepList&)                                          \
  kernel(void, lion, const StepList&)                                          \
  kernel(void, adan, const StepList&)                                          \
  kernel(void, square_sums, const SquaresList&)                                \
  kernel(bool, patch_apply, const PatchApplyArgs&)                             \
  kernel(void, patch_encode, const PatchEncodeArgs&, PatchPiece&)              \
  kernel(void, dither_quantise, const DitherQuantiseArgs&)                     \
  kernel(void, dither_dequantise, const DitherDequantiseArgs&)                 \
  kernel(void, scale_rows, const ScaleRowsArgs&)                               \
  kernel(void, lmmse_combine, const LmmseCombineArgs&)                         \
  kernel(void, rans_encode, const RansEncodeArgs&)                             \
  kernel(void, rans_decode, const RansDecodeArgs&)                             \
  kernel(bool, rans_count, const RansCountArgs&)                               \
  kernel(void, polar_transform, const PolarTransformArgs&)                     \
  kernel(void, polar_decode, const PolarDecodeArgs&)                           \
  kernel(void, coset_llr, const CosetLlrArgs&)                                 \
  kernel(void, coset_decode, const CosetDecodeArgs&)                           \
  kernel(void, source_energies, const SourceEnergiesArgs&, const EnergySums&)  \
  kernel(void, source_prediction, const SourcePredictionArgs&)                 \
  kernel(void, source_products, const SourceProductsArgs&)                     \
  kernel(void, source_history, const SourceHistoryArgs&)                       \
  kernel(void, update_add, const UpdateAddArgs&)
// clang-format on

struct Kernels {
  const char* isa;
  void (*copy_stream)(const float* from, float* to, std::int64_t numel);
  float (*read)(const float* from, std::int64_t numel);
#define COMMRT_MEMBER_OF(returns, name, ...) \
  returns (*name)(__VA_ARGS__, std::int64_t begin, std::int64_t end);
  COMMRT_KERNELS(COMMRT_MEMBER_OF)
#undef COMMRT_MEMBER_OF
};

}  // namespace commrt
