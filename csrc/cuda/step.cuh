// The loop that all optimizer steps are: a warp for a segment, eight elements a lane.
#pragma once

#include "../math/moment.h"
#include "../math/second.h"
#include "lane.cuh"
#include "tile.cuh"

namespace commrt::cuda {

__device__ __forceinline__ V div(V a, V b) { return a / b; }
__device__ __forceinline__ V sqrt(V x) { return root(x); }
__device__ __forceinline__ V where_greater(V x, V threshold, V value) {
  return x > threshold ? value : 0.0f;
}

}  // namespace commrt::cuda

#define COMMRT_RULES cuda
#define COMMRT_RULE __device__ __forceinline__
#include "../math/rules.h"

namespace commrt::cuda {

constexpr int kBatch = 20;  // tensors; a kernel takes 4 KiB of parameters

// Some tensors of a list. Units are segments, or what a kernel says.
template <typename Tensor>
struct Batch {
  Tensor tensors[kBatch];
  std::int64_t first_unit[kBatch + 1];
  int count;
  StepOptions options;
};
static_assert(sizeof(Batch<StepTensor>) <= 4096);

// The tensor that has a unit, and which of its units it is.
template <typename Tensor>
__device__ __forceinline__ const Tensor& find_tensor(const Batch<Tensor>& batch,
                                                     std::int64_t& unit) {
  int index = 0;
  while (batch.first_unit[index + 1] <= unit) ++index;
  unit -= batch.first_unit[index];
  return batch.tensors[index];
}

__device__ __forceinline__ std::int64_t warp_index() {
  return std::int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
}
__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }

// Elements [begin, cols) of a row; zeros are read beyond.
__device__ __forceinline__ Window row_of(const void* data, DType dtype, std::int64_t row,
                                         std::int64_t cols) {
  const auto* bytes = static_cast<const std::uint8_t*>(data) + row * cols * element_size(dtype);
  return {const_cast<std::uint8_t*>(bytes), dtype, cols, 0};
}

// Where a lane works: eight elements of a row from column `col`, `valid` of which there are.
struct Lane {
  std::int64_t row, col, offset;
  std::int64_t scale;  // of the segment
  int valid;

  __device__ __forceinline__ Lane(const StepTensor& tensor, std::int64_t segment) {
    const std::int64_t per_row = segments_per_row(tensor);
    row = segment / per_row;
    col = segment % per_row * kSegment + lane_index() * kPerLane;
    offset = row * tensor.cols + col;
    scale = segment;
    const std::int64_t left = tensor.cols - col;
    valid = static_cast<int>(left < 0 ? 0 : left < kPerLane ? left : kPerLane);
  }
};

// The uniform numbers of the eight elements.
__device__ __forceinline__ void draw(const StepTensor& tensor, const Lane& lane, Stream stream,
                                     float (&uniform)[kPerLane]) {
  const std::uint64_t first = tensor.first_index +
                              static_cast<std::uint64_t>(lane.row) * tensor.index_stride +
                              static_cast<std::uint64_t>(lane.col);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const std::uint64_t index = first + static_cast<unsigned>(i);
    const Philox4 x = philox(tensor.seed, stream, index / 4);
    const std::uint32_t low = index % 2 ? x.word[1] : x.word[0];
    const std::uint32_t high = index % 2 ? x.word[3] : x.word[2];
    uniform[i] = uniform_from_word(index % 4 < 2 ? low : high);
  }
}

// -- moments --------------------------------------------------------------------------------------

template <MomentFormat format>
__device__ __forceinline__ float decode_level(std::uint8_t byte, float scale) {
  const auto code = static_cast<float>(static_cast<std::int8_t>(byte));
  if constexpr (format == MomentFormat::kLinear8) return code * scale;
  if constexpr (format == MomentFormat::kSquare8) {
    return code * magnitude(code) * scale;
  }
  const float level = code + kUnsignedBias, square = level * level;
  return square * square * scale;
}

__device__ __forceinline__ float with_sign_of(float size, float sign) {
  return bits_to_float(float_to_bits(size) | (float_to_bits(sign) & 0x80000000u));
}

// A code, rounded to nearest, or by a uniform number.
template <MomentFormat format>
__device__ __forceinline__ std::uint8_t encode_level(float x, float inverse, bool is_drawn,
                                                     float uniform) {
  float code;
  if constexpr (format == MomentFormat::kLinear8) {
    code = x * inverse;
    if (is_drawn) {
      const float below = floor_even(code);
      code = clamp_level(below + (code - below > uniform ? 1.0f : 0.0f), 127.0f);
    }
  } else if constexpr (format == MomentFormat::kSquare8) {
    const float level = magnitude(x) * inverse;
    code = root(level);
    if (is_drawn) {
      const float below = floor_even(code);
      const float distance = level - below * below;
      const bool is_up = distance > uniform * (below + below + 1.0f);
      code = clamp_level(below + (is_up ? 1.0f : 0.0f), 127.0f);
    }
    code = with_sign_of(code, x);
  } else {
    const float level = root(root(x * inverse));
    code = (x > 0.0f && !(level > 1.0f) ? 1.0f : level) - kUnsignedBias;
  }
  return static_cast<std::uint8_t>(static_cast<int>(round_even(code)));
}

template <MomentFormat format>
__device__ __forceinline__ void load_moment(const StepTensor& tensor, int k, const Lane& lane,
                                            float (&x)[kPerLane]) {
  const Moment& moment = tensor.moments[k];
  if constexpr (format == MomentFormat::kFloat32 || format == MomentFormat::kBFloat16) {
    const DType dtype = format == MomentFormat::kFloat32 ? DType::kFloat32 : DType::kBFloat16;
    load(row_of(moment.values, dtype, lane.row, tensor.cols), lane.col, x);
  } else {
    const auto* codes = static_cast<const std::uint8_t*>(moment.values) + lane.offset;
    const float scale = lane.valid ? moment.scales[lane.scale] : 0.0f;
    const std::uint64_t word = lane.valid == kPerLane ? load_word<8>(codes) : 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      auto byte = static_cast<std::uint8_t>(word >> 8 * i);
      if (lane.valid < kPerLane) byte = i < lane.valid ? codes[i] : std::uint8_t{0};
      x[i] = i < lane.valid ? decode_level<format>(byte, scale) : 0.0f;
    }
  }
}

// Collective: all lanes of a segment.
template <MomentFormat format>
__device__ __forceinline__ void store_moment(const StepTensor& tensor, int k, const Lane& lane,
                                             const float (&x)[kPerLane]) {
  const Moment& moment = tensor.moments[k];
  if constexpr (format == MomentFormat::kFloat32 || format == MomentFormat::kBFloat16) {
    const DType dtype = format == MomentFormat::kFloat32 ? DType::kFloat32 : DType::kBFloat16;
    store(row_of(moment.values, dtype, lane.row, tensor.cols), lane.col, x);
  } else {
    std::uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const std::uint32_t magnitude = float_to_bits(x[i]) & 0x7fffffffu;
      if (i < lane.valid && magnitude > most) most = magnitude;
    }
    const MomentScale scale = moment_scale(max_over(kWarp, most), format);
    float uniform[kPerLane];
    const bool is_drawn = tensor.stochastic && k == 0;
    if (is_drawn) draw(tensor, lane, Stream::kMoment, uniform);
    std::uint64_t word = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      std::uint8_t code = format == MomentFormat::kFourth8 ? 0x80 : 0;
      if (scale.inverse != 0.0f) {
        code = encode_level<format>(x[i], scale.inverse, is_drawn, is_drawn ? uniform[i] : 0.0f);
      }
      word |= std::uint64_t{code} << 8 * i;
    }
    auto* codes = static_cast<std::uint8_t*>(moment.values) + lane.offset;
    if (lane.valid == kPerLane) {
      store_word<8>(codes, word);
    } else {
      for (int i = 0; i < lane.valid; ++i) codes[i] = static_cast<std::uint8_t>(word >> 8 * i);
    }
    __syncwarp();  // all lanes have read the former scale
    if (lane_index() == 0) moment.scales[lane.scale] = scale.scale;
  }
}

// -- weights --------------------------------------------------------------------------------------

__device__ __forceinline__ void load_weights(const StepTensor& tensor, const Lane& lane,
                                             float (&w)[kPerLane]) {
  if (tensor.weight_format == WeightFormat::kMaster) {
    return load(row_of(tensor.extra, DType::kFloat32, lane.row, tensor.cols), lane.col, w);
  }
  load(row_of(tensor.weights, tensor.weight_dtype, lane.row, tensor.cols), lane.col, w);
  if (tensor.weight_format != WeightFormat::kResidual) return;
  const auto* low = static_cast<const std::int8_t*>(tensor.extra) + lane.offset;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const auto high = static_cast<std::uint16_t>(float_to_bits(w[i]) >> 16);
    if (i < lane.valid) w[i] = join_weight(high, low[i]);
  }
}

__device__ __forceinline__ void store_weights(const StepTensor& tensor, const Lane& lane,
                                              const float (&w)[kPerLane]) {
  const Window weights = row_of(tensor.weights, tensor.weight_dtype, lane.row, tensor.cols);
  if (tensor.weight_format == WeightFormat::kMaster) {
    store(row_of(tensor.extra, DType::kFloat32, lane.row, tensor.cols), lane.col, w);
  }
  if (tensor.weight_format < WeightFormat::kResidual) return store(weights, lane.col, w);
  float kept[kPerLane], uniform[kPerLane];
  if (tensor.weight_format == WeightFormat::kStochastic) {
    draw(tensor, lane, Stream::kWeights, uniform);
  }
  auto* low = static_cast<std::int8_t*>(tensor.extra) + lane.offset;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (tensor.weight_format == WeightFormat::kStochastic) {
      kept[i] = bf16_to_float(round_weight(w[i], uniform[i]));
    } else {
      const SplitWeight parts = split_weight(w[i]);
      kept[i] = bf16_to_float(parts.high);
      if (i < lane.valid) low[i] = parts.low;
    }
  }
  store(weights, lane.col, kept);
}

// -- a segment ------------------------------------------------------------------------------------

template <typename Rule, Storage storage, int k>
__device__ __forceinline__ void load_moments(const StepTensor& tensor, const Lane& lane,
                                             float (&m)[Rule::kMoments][kPerLane]) {
  if constexpr (k < Rule::kMoments) {
    load_moment<kMomentFormat<Rule, storage, k>>(tensor, k, lane, m[k]);
    load_moments<Rule, storage, k + 1>(tensor, lane, m);
  }
}
template <typename Rule, Storage storage, int k>
__device__ __forceinline__ void store_moments(const StepTensor& tensor, const Lane& lane,
                                              const float (&m)[Rule::kMoments][kPerLane]) {
  if constexpr (k < Rule::kMoments) {
    store_moment<kMomentFormat<Rule, storage, k>>(tensor, k, lane, m[k]);
    store_moments<Rule, storage, k + 1>(tensor, lane, m);
  }
}

// rule(tensor, lane, i, gradient, weight, moments) for each element.
template <typename Rule, Storage storage, typename Apply>
__device__ __forceinline__ void step_segment(const StepTensor& tensor, std::int64_t segment,
                                             Apply apply) {
  const Lane lane(tensor, segment);
  float g[kPerLane], w[kPerLane], m[Rule::kMoments][kPerLane];
  load(row_of(tensor.grad, tensor.grad_dtype, lane.row, tensor.cols), lane.col, g);
  load_weights(tensor, lane, w);
  load_moments<Rule, storage, 0>(tensor, lane, m);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    float own[Rule::kMoments];
#pragma unroll
    for (int k = 0; k < Rule::kMoments; ++k) own[k] = m[k][i];
    apply(lane, i, g[i], w[i], own);
#pragma unroll
    for (int k = 0; k < Rule::kMoments; ++k) m[k][i] = own[k];
  }
  store_moments<Rule, storage, 0>(tensor, lane, m);
  store_weights(tensor, lane, w);
}

template <typename Rule, Storage storage>
__global__ void __launch_bounds__(kThreads) step_kernel(Batch<StepTensor> batch) {
  std::int64_t unit = warp_index();
  if (unit >= batch.first_unit[batch.count]) return;
  const StepTensor& tensor = find_tensor(batch, unit);
  const Rule rule(batch.options, tensor);
  step_segment<Rule, storage>(
      tensor, unit,
      [&](const Lane&, int, float g, float& w, float (&m)[Rule::kMoments]) { rule(g, w, m); });
}

template <Storage storage>
__global__ void __launch_bounds__(kThreads) adam_mini_kernel(Batch<StepTensor> batch) {
  std::int64_t unit = warp_index();
  if (unit >= batch.first_unit[batch.count]) return;
  const StepTensor& tensor = find_tensor(batch, unit);
  const AdamMiniRule rule(batch.options);
  const bool by_column = tensor.second_from == Second::kOfColumn;
  const float of_row =
      by_column ? 0.0f : step_factor(tensor.second[unit / segments_per_row(tensor)], batch.options);
  step_segment<AdamMiniRule, storage>(
      tensor, unit, [&](const Lane& lane, int i, float g, float& w, float (&m)[1]) {
        const bool is_column = by_column && i < lane.valid;
        rule(g, w, m, is_column ? step_factor(tensor.second[lane.col + i], batch.options) : of_row);
      });
}

// -- sums of squares ------------------------------------------------------------------------------

// Of a segment, on every lane; the order is that of segment_squares() in csrc/cpu/squares.h.
__device__ __forceinline__ float segment_squares(const Window& row, std::int64_t col) {
  float x[kPerLane];
  load(row, col + lane_index() * kPerLane, x);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) x[i] = x[i] * x[i];
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] += __shfl_xor_sync(kAllLanes, x[i], distance);
  }
#pragma unroll
  for (int width = kPerLane / 2; width > 0; width /= 2) {
#pragma unroll
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  }
  return x[0];
}

// Of whole rows, by a warp, on every lane.
__device__ __forceinline__ double row_squares(const void* grad, DType dtype, std::int64_t first,
                                              std::int64_t rows, std::int64_t cols) {
  const int lane = lane_index();
  double sum = 0.0;
  unsigned next = 0;
  for (std::int64_t row = first; row < first + rows; ++row) {
    const Window window = row_of(grad, dtype, row, cols);
#pragma unroll 4
    for (std::int64_t col = 0; col < cols; col += kSegment, ++next) {
      const float squares = segment_squares(window, col);
      if (static_cast<int>(next % kWarp) == lane) sum += static_cast<double>(squares);
    }
  }
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  }
  return sum;
}

// A unit is a block of rows whose second moment is to be updated.
template <int warps>
__global__ void __launch_bounds__(warps* kWarp) second_kernel(Batch<StepTensor> batch) {
  std::int64_t unit = warp_index();
  if (unit >= batch.first_unit[batch.count]) return;
  const StepTensor& tensor = find_tensor(batch, unit);
  const std::int64_t first = unit * tensor.block_rows;
  const double squares =
      row_squares(tensor.grad, tensor.grad_dtype, first, tensor.block_rows, tensor.cols);
  const float mean =
      mean_square(squares, tensor.block_rows * tensor.cols, grad_multiplier(batch.options));
  for (std::int64_t row = first + lane_index(); row < first + tensor.block_rows; row += kWarp) {
    tensor.second[row] = updated_second(tensor.second[row], mean, batch.options.beta2);
  }
}

// A unit is a row, or thirty-two columns.
template <int warps>
__global__ void __launch_bounds__(warps* kWarp) square_sums_kernel(Batch<SquaresTensor> batch) {
  std::int64_t unit = warp_index();
  if (unit >= batch.first_unit[batch.count]) return;
  const SquaresTensor& tensor = find_tensor(batch, unit);
  if (!tensor.by_column) {
    const double sum = row_squares(tensor.grad, tensor.grad_dtype, unit, 1, tensor.cols);
    if (lane_index() == 0) tensor.sums[unit] = sum;
    return;
  }
  const std::int64_t col = unit * kWarp + lane_index();
  if (col >= tensor.cols) return;
  double sum = 0.0;
#pragma unroll 4
  for (std::int64_t row = 0; row < tensor.rows; ++row) {
    const auto x = static_cast<double>(
        load_one(row_of(tensor.grad, tensor.grad_dtype, row, tensor.cols), col));
    sum += x * x;
  }
  tensor.sums[col] = sum;
}

}  // namespace commrt::cuda
