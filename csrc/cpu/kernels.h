// The ops for one instruction set; each works on blocks, or units of a list, [begin, end).
#pragma once

#include "../dither.h"
#include "../ops.h"
#include "../polar.h"
#include "../rans.h"
#include "../step.h"
#include "patch_piece.h"

namespace commrt {

struct Kernels {
  const char* isa;
  void (*block_encode)(const BlockEncodeArgs&, std::int64_t begin, std::int64_t end);
  void (*block_decode)(const BlockDecodeArgs&, std::int64_t begin, std::int64_t end);
  void (*loco_encode)(const LocoEncodeArgs&, std::int64_t begin, std::int64_t end);
  void (*decode_average)(const DecodeAverageArgs&, std::int64_t begin, std::int64_t end);
  void (*decode_average_encode)(const DecodeAverageEncodeArgs&, std::int64_t begin,
                                std::int64_t end);
  void (*rescale)(const RescaleArgs&, std::int64_t begin, std::int64_t end);
  void (*adam_mini)(const StepList&, std::int64_t begin, std::int64_t end);
  void (*adamw)(const StepList&, std::int64_t begin, std::int64_t end);
  void (*mofo)(const StepList&, std::int64_t begin, std::int64_t end);
  void (*lion)(const StepList&, std::int64_t begin, std::int64_t end);
  void (*adan)(const StepList&, std::int64_t begin, std::int64_t end);
  void (*square_sums)(const SquaresList&, std::int64_t begin, std::int64_t end);
  void (*copy_stream)(const float* from, float* to, std::int64_t numel);
  float (*read)(const float* from, std::int64_t numel);
  bool (*patch_apply)(const PatchApplyArgs&, std::int64_t begin, std::int64_t end);
  void (*patch_encode)(const PatchEncodeArgs&, PatchPiece&, std::int64_t begin, std::int64_t end);
  void (*dither_quantise)(const DitherQuantiseArgs&, std::int64_t begin, std::int64_t end);
  void (*dither_dequantise)(const DitherDequantiseArgs&, std::int64_t begin, std::int64_t end);
  void (*scale_rows)(const ScaleRowsArgs&, std::int64_t begin, std::int64_t end);
  void (*lmmse_combine)(const LmmseCombineArgs&, std::int64_t begin, std::int64_t end);
  void (*rans_encode)(const RansEncodeArgs&, std::int64_t begin, std::int64_t end);
  void (*rans_decode)(const RansDecodeArgs&, std::int64_t begin, std::int64_t end);
  void (*polar_transform)(const PolarTransformArgs&, std::int64_t begin, std::int64_t end);
  void (*polar_decode)(const PolarDecodeArgs&, std::int64_t begin, std::int64_t end);
  void (*coset_llr)(const CosetLlrArgs&, std::int64_t begin, std::int64_t end);
  void (*coset_decode)(const CosetDecodeArgs&, std::int64_t begin, std::int64_t end);
};

}  // namespace commrt
