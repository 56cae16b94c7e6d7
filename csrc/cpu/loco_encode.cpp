#include "block.h"

namespace commrt::COMMRT_ISA {
namespace {

// What a tile carries from phase to phase.
struct Tile {
  std::int64_t first;                    // block
  int count;                             // of blocks
  TileBuffer value;                      // h, then the updated residual
  TileBuffer error_codes;                // the old residual's codes as floats
  std::uint32_t absmax[kMaxTileBlocks];  // bits of max |h|, then of the updated residual's maximum
};

// h = g + e.
template <DType dtype, int residual_bits>
COMMRT_PHASE void compensate(const LocoEncodeArgs& args, Tile& tile) {
  const int block = args.format.block;
  constexpr std::int64_t size = element_size(dtype);
  const std::int64_t residual_bytes = code_bytes(residual_bits, block);
  const std::uint8_t* error = args.residual.codes + tile.first * residual_bytes;
  TileBuffer padded;
  for (std::int64_t i = 0; i < tile.count * residual_bytes; i += 64) {
    prefetch(error + i + kPrefetchBytes * residual_bits / 32);
  }
  for (int b = 0; b < tile.count; ++b, error += residual_bytes) {
    const std::uint8_t* grad = block_input<dtype>(args.grad, block, tile.first + b, padded);
    const Vf scale = broadcast(bf16_to_float(args.residual.scales[tile.first + b]));
    float* value = tile.value.value + b * block;
    float* error_codes = tile.error_codes.value + b * block;
    Vu most = zero_words();
    COMMRT_UNROLL
    for (int i = 0; i < block; i += kGroup) {
      prefetch(grad + i * size + kPrefetchBytes);
      if constexpr (size == 4) prefetch(grad + i * size + kPrefetchBytes + 64);
      const Group e = load_codes<residual_bits>(error + i * residual_bits / 8);
      const Group h = {exact_fma(e.first, scale, load<dtype>(grad + i * size)),
                       exact_fma(e.second, scale, load<dtype>(grad + (i + kLanes) * size))};
      most = max_words(most, max_words(abs_bits(h.first), abs_bits(h.second)));
      store_group(error_codes + i, e);
      store_group(value + i, h);
    }
    tile.absmax[b] = max_lanes(most);
  }
}

// beta e + (1 - beta) (h - Q(h))
COMMRT_INLINE Vf update(Vf error_codes, Vf kept_scale, Vf h, Vf level, Vf sent_scale, Vf release) {
  const Vf missed = exact_fnma(round_even(level), sent_scale, h);
  return add(mul(error_codes, kept_scale), mul(release, missed));
}

// Codes of a block of h, and beta e + (1 - beta) (h - Q(h)) in its place; returns the bits of the
// maximum.
template <int bits>
COMMRT_INLINE std::uint32_t quantise_and_update(float* value, const float* error_codes,
                                                float kept_scale, float release_share,
                                                std::uint16_t scale, float inverse_scale, int block,
                                                const float* uniform, std::uint8_t* codes) {
  const Vf sent_scale = broadcast(bf16_to_float(scale)), inverse = broadcast(inverse_scale);
  const Vf keep = broadcast(kept_scale), release = broadcast(release_share);
  Vf most = broadcast(0.0f);
  COMMRT_UNROLL
  for (int i = 0; i < block; i += kGroup) {
    const Group h = load_group(value + i), e = load_group(error_codes + i);
    const Group level = to_levels<bits>(h, inverse, uniform == nullptr ? nullptr : uniform + i);
    store_codes<bits>(codes + i * bits / 8, level);
    const Group updated = {update(e.first, keep, h.first, level.first, sent_scale, release),
                           update(e.second, keep, h.second, level.second, sent_scale, release)};
    most = max_magnitude(max_magnitude(most, updated.first), updated.second);
    store_group(value + i, updated);
  }
  return max_lanes(abs_bits(most));
}

template <int bits>
COMMRT_PHASE void send(const LocoEncodeArgs& args, const TileScales& scales, Tile& tile) {
  const int block = args.format.block;
  const TileRounding rounding =
      tile_rounding(args.rounding, Stream::kCodes, args.grad, block, tile.first);
  TileBuffer draws;
  for (int b = 0; b < tile.count; ++b) {
    std::uint8_t* codes = args.payload.codes + (tile.first + b) * code_bytes(bits, block);
    args.payload.scales[tile.first + b] = scales.scale[b];
    if (scales.scale[b] == kScaleNaN) {
      zero_codes(codes, bits, block);
      continue;
    }
    const float error_scale = bf16_to_float(args.residual.scales[tile.first + b]);
    tile.absmax[b] =
        quantise_and_update<bits>(tile.value.value + b * block, tile.error_codes.value + b * block,
                                  args.beta * error_scale, 1.0f - args.beta, scales.scale[b],
                                  scales.inverse[b], block, rounding.draw(draws, block, b), codes);
    // A block too small for a scale has no signs either: its codes are zero at any width.
    if (bits == 1 && scales.scale[b] == 0) zero_codes(codes, bits, block);
  }
}

// The updated residual in place of the old one, except where the block was not finite.
template <int residual_bits>
COMMRT_PHASE void store_residual(const LocoEncodeArgs& args, const TileScales& sent, Tile& tile) {
  const int block = args.format.block;
  const Rounding stored = {residual_bits == 4, args.rounding.seed};
  const TileRounding rounding =
      tile_rounding(stored, Stream::kResidual, args.grad, block, tile.first);
  TileScales scales;
  scales.from_absmax(tile.absmax, tile.count, residual_bits);
  TileBuffer draws;
  for (int b = 0; b < tile.count; ++b) {
    if (sent.scale[b] == kScaleNaN) continue;
    args.residual.scales[tile.first + b] = scales.scale[b];
    encode_block<residual_bits>(
        tile.value.value + b * block, block, scales.scale[b], scales.inverse[b],
        rounding.draw(draws, block, b),
        args.residual.codes + (tile.first + b) * code_bytes(residual_bits, block));
  }
}

void encode_tile(const LocoEncodeArgs& args, std::int64_t first, int count) {
  Tile tile;
  tile.first = first;
  tile.count = count;
  const bool is_small = args.residual_bits == 4;
  with_dtype(args.grad.dtype, [&]<DType dtype>() {
    is_small ? compensate<dtype, 4>(args, tile) : compensate<dtype, 8>(args, tile);
  });
  const TileScales scales =
      choose_scales(tile.value.value, tile.absmax, count, args.format, &args.grad, first);
  with_bits(args.format.bits, [&]<int bits>() { send<bits>(args, scales, tile); });
  is_small ? store_residual<4>(args, scales, tile) : store_residual<8>(args, scales, tile);
}

}  // namespace

void loco_encode(const LocoEncodeArgs& args, std::int64_t begin, std::int64_t end) {
  for_each_tile(args.format.block, begin, end,
                [&](std::int64_t first, int count) { encode_tile(args, first, count); });
}

}  // namespace commrt::COMMRT_ISA
