// block_encode and loco_encode.
#pragma once

#include "tile.cuh"

namespace commrt::cuda {

template <int bits, int rows>
__global__ void __launch_bounds__(kThreads)
    block_encode_kernel(BlockEncodeArgs args, std::int64_t num_blocks) {
  const Place<rows> place(args.format.block, num_blocks);
  float x[rows][kPerLane];
#pragma unroll
  for (int row = 0; row < rows; ++row) load(args.input, place.element(row), x[row]);
  const int valid = valid_in_block(args.input, place.block_size(), place.block);
  const std::uint16_t scale = choose_scale(place, staged_by_warp<rows>(), args.format, valid, x);
  encode_block<bits>(place, scale, args.rounding, Stream::kCodes, args.input.first_index, x,
                     args.payload);
}

// h = g + e is sent; beta e + (1 - beta) (h - Q(h)) is kept. The residual's words stay in registers, as
// h does, so that memory is read once.
template <int bits, int residual_bits, int rows>
__global__ void __launch_bounds__(kThreads)
    loco_encode_kernel(LocoEncodeArgs args, std::int64_t num_blocks) {
  const Place<rows> place(args.format.block, num_blocks);
  const float error_scale =
      place.is_block ? bf16_to_float(load_scale(args.residual.scales + place.block)) : 0.0f;
  float h[rows][kPerLane];
  std::uint64_t error_word[rows];
#pragma unroll
  for (int row = 0; row < rows; ++row) {
    float error[kPerLane];
    error_word[row] = load_codes<residual_bits>(place, row, args.residual.codes);
    load(args.grad, place.element(row), h[row]);
    unpack<residual_bits>(error_word[row], error);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) h[row][i] = fmaf(error[i], error_scale, h[row][i]);
  }
  const int valid = valid_in_block(args.grad, place.block_size(), place.block);
  const std::uint16_t scale = choose_scale(place, staged_by_warp<rows>(), args.format, valid, h);

  const float sent_scale = bf16_to_float(scale), inverse = inverse_scale(scale);
  const float keep = args.beta * error_scale, release = 1.0f - args.beta;
#pragma unroll
  for (int row = 0; row < rows; ++row) {
    float level[kPerLane], error[kPerLane];
    to_levels<bits>(h[row], inverse, args.rounding, Stream::kCodes,
                    args.grad.first_index + place.element(row), level);
    store_codes<bits>(place, row, scale, level, args.payload);
    unpack<residual_bits>(error_word[row], error);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const float missed = fmaf(-round_even(level[i]), sent_scale, h[row][i]);
      h[row][i] = error[i] * keep + release * missed;
    }
  }
  if (place.is_leader()) store_scale(args.payload.scales + place.block, scale);

  const std::uint16_t residual_scale = scale_from_absmax(block_absmax(place, h), residual_bits);
  Place<rows> kept = place;
  // A block that was not finite leaves its residual as it was.
  kept.is_block = place.is_block && scale != kScaleNaN;
  __syncwarp();  // all lanes have read the old scale
  encode_block<residual_bits>(kept, residual_scale,
                              Rounding{residual_bits == 4, args.rounding.seed}, Stream::kResidual,
                              args.grad.first_index, h, args.residual);
}

}  // namespace commrt::cuda
