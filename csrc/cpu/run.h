// The piece of a tensor that an optimizer step works on at a time, and its random numbers.
#pragma once

#include "../step.h"
#include "block.h"

namespace commrt::COMMRT_ISA {

constexpr int kRun = kTileElements;  // elements, a multiple of kSegment
constexpr int kRunSegments = kRun / kSegment;

// Elements ahead of those in hand that are fetched from memory; measured. What is decoded and encoded
// takes more time between one fetch and the next.
template <Storage storage>
constexpr int kAhead = storage == Storage::kEightBits ? 2048 : 512;

// Elements [col, col + count) of a row; `col` is a multiple of kSegment.
struct Run {
  std::int64_t row, col;
  int count;
};

COMMRT_INLINE std::int64_t offset_of(const StepTensor& tensor, const Run& run) {
  return run.row * tensor.cols + run.col;
}

// Of a run, which may begin anywhere in a group.
struct alignas(64) DrawBuffer {
  float value[kRun + kGroup + kUniformSlack];
};

// The uniform numbers of a run, in `buffer`.
COMMRT_INLINE const float* draw(const StepTensor& tensor, const Run& run, Stream stream,
                                DrawBuffer& buffer) {
  const std::uint64_t index = tensor.first_index +
                              static_cast<std::uint64_t>(run.row) * tensor.index_stride +
                              static_cast<std::uint64_t>(run.col);
  const auto before = static_cast<int>(index % kGroup);
  fill_uniform(buffer.value, (before + run.count + kGroup - 1) / kGroup * kGroup, tensor.seed,
               stream, index - static_cast<unsigned>(before));
  return buffer.value + before;
}

// `count` elements as fp32: where they lie, or in `buffer`.
template <DType dtype>
COMMRT_INLINE const float* widen_floats(const void* from, std::int64_t offset, int count,
                                        TileBuffer& buffer) {
  if constexpr (dtype == DType::kFloat32) return static_cast<const float*>(from) + offset;
  const auto* halves = static_cast<const std::uint16_t*>(from) + offset;
  for (int i = 0; i < count; ++i) {
    buffer.value[i] =
        dtype == DType::kBFloat16 ? bf16_to_float(halves[i]) : fp16_to_float(halves[i]);
  }
  return buffer.value;
}

}  // namespace commrt::COMMRT_ISA
