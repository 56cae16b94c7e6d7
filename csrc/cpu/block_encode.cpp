#include "block.h"

namespace commrt::COMMRT_ISA {
namespace {

// The block as fp32 into `value`; returns the bits of its maximum magnitude.
template <DType dtype>
COMMRT_INLINE std::uint32_t load_block(const std::uint8_t* input, int block, float* value) {
  constexpr std::int64_t size = element_size(dtype);
  Vu most = zero_words();
  for (int i = 0; i < block; i += kLanes) {
    prefetch(input + i * size + kPrefetchBytes);
    const Vf x = load<dtype>(input + i * size);
    most = max_words(most, abs_bits(x));
    store<DType::kFloat32>(value + i, x);
  }
  return max_lanes(most);
}

template <DType dtype, int bits>
COMMRT_INLINE void encode_tile(const BlockEncodeArgs& args, std::int64_t first, int count) {
  const int block = args.format.block;
  TileBuffer value, padded, draws;
  std::uint32_t absmax[kMaxTileBlocks];
  for (int b = 0; b < count; ++b) {
    const std::uint8_t* input = block_input<dtype>(args.input, block, first + b, padded);
    absmax[b] = load_block<dtype>(input, block, value.value + b * block);
  }
  std::uint16_t* scales = args.payload.scales + first;
  for (int b = 0; b < count; ++b) {
    const int valid = valid_in_block(args.input, block, first + b);
    scales[b] = choose_scale(value.value + b * block, valid, absmax[b], args.format);
  }
  for (int b = 0; b < count; ++b) {
    const float* uniform =
        args.rounding.stochastic
            ? draw(draws, args.rounding.seed, Stream::kCodes, args.input, block, first + b)
            : nullptr;
    encode_values<bits>(value.value + b * block, block, scales[b], uniform,
                        args.payload.codes + (first + b) * code_bytes(bits, block));
  }
}

}  // namespace

void block_encode(const BlockEncodeArgs& args, std::int64_t begin, std::int64_t end) {
  with_dtype(args.input.dtype, [&]<DType dtype>() {
    with_bits(args.format.bits, [&]<int bits>() {
      for_each_tile(args.format.block, begin, end, [&](std::int64_t first, int count) {
        encode_tile<dtype, bits>(args, first, count);
      });
    });
  });
}

}  // namespace commrt::COMMRT_ISA
