// block_decode, decode_average and decode_average_encode.
#pragma once

#include "tile.cuh"

namespace commrt::cuda {

// A GPU's own NaN differs from a CPU's.
__device__ __forceinline__ float canonical(float x) {
  return x == x ? x : bits_to_float(0x7fc00000u);
}

template <int bits, int rows>
__global__ void __launch_bounds__(kThreads)
    block_decode_kernel(BlockDecodeArgs args, std::int64_t num_blocks) {
  const Place<rows> place(args.format.block, num_blocks);
  const float scale =
      place.is_block ? bf16_to_float(load_scale(args.payload.scales + place.block)) : 0.0f;
#pragma unroll
  for (int row = 0; row < rows; ++row) {
    float x[kPerLane];
    unpack<bits>(load_codes<bits>(place, row, args.payload.codes), x);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] = canonical(x[i] * scale);
    if (place.is_block) store(args.output, place.element(row), x);
  }
}

// Sum in rank order, then one multiplication by 1 / count.
template <int bits, int rows>
__device__ __forceinline__ void average(const Place<rows>& place, const PayloadStack& stack,
                                        float (&mean)[rows][kPerLane]) {
#pragma unroll
  for (int row = 0; row < rows; ++row) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) mean[row][i] = 0.0f;
  }
  const std::uint8_t* codes = stack.codes;
  const auto* scales = reinterpret_cast<const std::uint8_t*>(stack.scales + place.block);
#pragma unroll 4
  for (int rank = 0; rank < stack.count; ++rank, codes += stack.stride, scales += stack.stride) {
    const auto* scale_code = reinterpret_cast<const std::uint16_t*>(scales);
    const float scale = place.is_block ? bf16_to_float(load_scale(scale_code)) : 0.0f;
#pragma unroll
    for (int row = 0; row < rows; ++row) {
      float code[kPerLane];
      unpack<bits>(load_codes<bits>(place, row, codes), code);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) mean[row][i] = fmaf(code[i], scale, mean[row][i]);
    }
  }
  const float inverse_count = 1.0f / static_cast<float>(stack.count);
#pragma unroll
  for (int row = 0; row < rows; ++row) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) mean[row][i] = canonical(mean[row][i] * inverse_count);
  }
}

template <int bits, int rows>
__global__ void __launch_bounds__(kThreads)
    decode_average_kernel(DecodeAverageArgs args, std::int64_t num_blocks) {
  const Place<rows> place(args.format.block, num_blocks);
  float mean[rows][kPerLane];
  average<bits>(place, args.payloads, mean);
#pragma unroll
  for (int row = 0; row < rows; ++row) {
    if (place.is_block) store(args.output, place.element(row), mean[row]);
  }
}

template <int bits, int output_bits, int rows>
__global__ void __launch_bounds__(kThreads)
    decode_average_encode_kernel(DecodeAverageEncodeArgs args, std::int64_t num_blocks) {
  const Place<rows> place(args.format.block, num_blocks);
  float mean[rows][kPerLane];
  average<bits>(place, args.payloads, mean);
  const std::uint16_t scale =
      choose_scale(place, staged_by_warp<rows>(), args.output_format, args.format.block, mean);
  encode_block<output_bits>(place, scale, Rounding{false, 0}, Stream::kCodes, 0, mean, args.output);
}

}  // namespace commrt::cuda
