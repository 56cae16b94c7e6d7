// Weights as fp32, a run of a row at a time: where they lie if they are fp32, else in a buffer that is
// decoded before and encoded after.
#pragma once

#include "../math/moment.h"
#include "run.h"

namespace commrt::COMMRT_ISA {

COMMRT_PHASE void decode_weights(const StepTensor& tensor, std::int64_t offset, int count,
                                 float* to) {
  const auto* high = static_cast<const std::uint16_t*>(tensor.weights) + offset;
  if (tensor.weight_format == WeightFormat::kResidual) {
    const auto* low = static_cast<const std::int8_t*>(tensor.extra) + offset;
    for (int i = 0; i < count; ++i) to[i] = join_weight(high[i], low[i]);
  } else {
    for (int i = 0; i < count; ++i) to[i] = bf16_to_float(high[i]);
  }
}

COMMRT_PHASE void split_weights(const float* from, const StepTensor& tensor, std::int64_t offset,
                                int count) {
  auto* high = static_cast<std::uint16_t*>(tensor.weights) + offset;
  auto* low = static_cast<std::int8_t*>(tensor.extra) + offset;
  for (int i = 0; i < count; ++i) {
    const SplitWeight parts = split_weight(from[i]);
    high[i] = parts.high;
    low[i] = parts.low;
  }
}

COMMRT_PHASE void round_weights(const float* from, const StepTensor& tensor, std::int64_t offset,
                                int count, const float* uniform) {
  auto* weights = static_cast<std::uint16_t*>(tensor.weights) + offset;
  for (int i = 0; i < count; ++i) weights[i] = round_weight(from[i], uniform[i]);
}

// Past the caches where that can be: nobody reads them before the next forward pass.
template <DType dtype>
COMMRT_PHASE void narrow_weights(const float* from, const StepTensor& tensor, std::int64_t offset,
                                 int count) {
  auto* weights = static_cast<std::uint16_t*>(tensor.weights) + offset;
  const bool past_caches = reinterpret_cast<std::uintptr_t>(weights) % 32 == 0;
  int i = 0;
  COMMRT_UNROLL
  for (; i + kLanes <= count; i += kLanes) {
    const Vf x = load<DType::kFloat32>(from + i);
    past_caches ? stream<dtype>(weights + i, x) : store<dtype>(weights + i, x);
  }
  for (; i < count; ++i) {
    weights[i] = dtype == DType::kBFloat16 ? float_to_bf16(from[i]) : float_to_fp16(from[i]);
  }
}

COMMRT_INLINE float* open_weights(const StepTensor& tensor, const Run& run, TileBuffer& buffer) {
  const std::int64_t offset = offset_of(tensor, run);
  switch (tensor.weight_format) {
    case WeightFormat::kFloat32: return static_cast<float*>(tensor.weights) + offset;
    case WeightFormat::kMaster: return static_cast<float*>(tensor.extra) + offset;
    default: decode_weights(tensor, offset, run.count, buffer.value); return buffer.value;
  }
}

COMMRT_INLINE void close_weights(const float* from, const StepTensor& tensor, const Run& run) {
  const std::int64_t offset = offset_of(tensor, run);
  switch (tensor.weight_format) {
    case WeightFormat::kFloat32: return;
    case WeightFormat::kMaster:
      tensor.weight_dtype == DType::kBFloat16
          ? narrow_weights<DType::kBFloat16>(from, tensor, offset, run.count)
          : narrow_weights<DType::kFloat16>(from, tensor, offset, run.count);
      return;
    case WeightFormat::kResidual: return split_weights(from, tensor, offset, run.count);
    default: {
      DrawBuffer draws;
      const float* uniform = draw(tensor, run, Stream::kWeights, draws);
      round_weights(from, tensor, offset, run.count, uniform);
    }
  }
}

}  // namespace commrt::COMMRT_ISA
