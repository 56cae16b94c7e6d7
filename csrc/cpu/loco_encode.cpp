#include "block.h"

namespace commrt::COMMRT_ISA {
namespace {

// What a tile carries from phase to phase.
struct Tile {
  TileBuffer value;        // h, then the updated residual
  TileBuffer error_codes;  // the old residual's codes as floats
  TileBuffer draws;
  TileBuffer padded;
  std::uint32_t absmax[kMaxTileBlocks];
};

// h = g + e into `value`, the codes of e into `error_codes`; returns the bits of max |h|.
template <DType dtype, int residual_bits>
COMMRT_INLINE std::uint32_t compensate(const std::uint8_t* grad, const std::uint8_t* error,
                                       std::uint16_t error_scale, int block, float* value,
                                       float* error_codes) {
  constexpr std::int64_t size = element_size(dtype);
  const Vf scale = broadcast(bf16_to_float(error_scale));
  Vu most = zero_words();
  for (int i = 0; i < block; i += kLanes) {
    prefetch(grad + i * size + kPrefetchBytes);
    const Vf e = load_codes<residual_bits>(error + i * residual_bits / 8);
    const Vf h = exact_fma(e, scale, load<dtype>(grad + i * size));
    most = max_words(most, abs_bits(h));
    store<DType::kFloat32>(error_codes + i, e);
    store<DType::kFloat32>(value + i, h);
  }
  return max_lanes(most);
}

// Codes of h, and beta e + (1 - beta) (h - Q(h)) in place of h; returns the bits of its maximum.
template <int bits>
COMMRT_INLINE std::uint32_t quantise_and_update(float* value, const float* error_codes,
                                                std::uint16_t error_scale, std::uint16_t scale,
                                                const float* uniform, int block, float beta,
                                                std::uint8_t* codes) {
  const Vf sent_scale = broadcast(bf16_to_float(scale)), inverse = broadcast(inverse_of(scale));
  const Vf kept_scale = broadcast(beta * bf16_to_float(error_scale));
  const Vf release = broadcast(1.0f - beta);
  Vu most = zero_words();
  for (int i = 0; i < block; i += kLanes) {
    const Vf h = load<DType::kFloat32>(value + i);
    const Vf level = to_level<bits>(h, inverse, uniform == nullptr ? nullptr : uniform + i);
    store_codes<bits>(codes + i * bits / 8, level);
    const Vf missed = mul(release, exact_fnma(round_even(level), sent_scale, h));
    const Vf kept = mul(load<DType::kFloat32>(error_codes + i), kept_scale);
    const Vf updated = add(kept, missed);
    most = max_words(most, abs_bits(updated));
    store<DType::kFloat32>(value + i, updated);
  }
  return max_lanes(most);
}

template <DType dtype, int bits, int residual_bits>
COMMRT_INLINE void encode_tile(const LocoEncodeArgs& args, std::int64_t first, int count) {
  const int block = args.format.block;
  const std::int64_t residual_bytes = code_bytes(residual_bits, block);
  std::uint8_t* error = args.residual.codes + first * residual_bytes;
  std::uint16_t* error_scales = args.residual.scales + first;
  std::uint16_t* scales = args.payload.scales + first;
  Tile tile;
  for (std::int64_t i = 0; i < count * residual_bytes; i += 64) {
    prefetch(error + i + kPrefetchBytes * residual_bits / 32);
  }
  for (int b = 0; b < count; ++b) {
    const std::uint8_t* grad = block_input<dtype>(args.grad, block, first + b, tile.padded);
    tile.absmax[b] = compensate<dtype, residual_bits>(
        grad, error + b * residual_bytes, error_scales[b], block, tile.value.value + b * block,
        tile.error_codes.value + b * block);
  }
  for (int b = 0; b < count; ++b) {
    const int valid = valid_in_block(args.grad, block, first + b);
    scales[b] = choose_scale(tile.value.value + b * block, valid, tile.absmax[b], args.format);
  }
  for (int b = 0; b < count; ++b) {
    std::uint8_t* codes = args.payload.codes + (first + b) * code_bytes(bits, block);
    if (scales[b] == kScaleNaN) {
      zero_codes(codes, bits, block);
      continue;
    }
    const float* uniform = nullptr;
    if (args.rounding.stochastic) {
      uniform = draw(tile.draws, args.rounding.seed, Stream::kCodes, args.grad, block, first + b);
    }
    tile.absmax[b] = quantise_and_update<bits>(
        tile.value.value + b * block, tile.error_codes.value + b * block, error_scales[b], scales[b],
        uniform, block, args.beta, codes);
  }
  for (int b = 0; b < count; ++b) {
    if (scales[b] == kScaleNaN) continue;
    error_scales[b] = scale_from_absmax(bits_to_float(tile.absmax[b]), residual_bits);
  }
  for (int b = 0; b < count; ++b) {
    if (scales[b] == kScaleNaN) continue;
    const float* uniform = nullptr;
    if constexpr (residual_bits == 4) {
      uniform = draw(tile.draws, args.rounding.seed, Stream::kResidual, args.grad, block, first + b);
    }
    encode_values<residual_bits>(tile.value.value + b * block, block, error_scales[b], uniform,
                                 error + b * residual_bytes);
  }
}

}  // namespace

void loco_encode(const LocoEncodeArgs& args, std::int64_t begin, std::int64_t end) {
  with_dtype(args.grad.dtype, [&]<DType dtype>() {
    with_bits(args.format.bits, [&]<int bits>() {
      for_each_tile(args.format.block, begin, end, [&](std::int64_t first, int count) {
        if (args.residual_bits == 4) return encode_tile<dtype, bits, 4>(args, first, count);
        encode_tile<dtype, bits, 8>(args, first, count);
      });
    });
  });
}

}  // namespace commrt::COMMRT_ISA
