#include "block.h"

namespace commrt::COMMRT_ISA {
namespace {

// A tile as fp32 into `value`, and the bits of each block's maximum magnitude.
template <DType dtype>
COMMRT_PHASE void load_tile(const Window& input, int block, std::int64_t first, int count,
                            float* value, std::uint32_t* absmax) {
  constexpr std::int64_t size = element_size(dtype);
  TileBuffer padded;
  for (int b = 0; b < count; ++b) {
    const std::uint8_t* from = block_input<dtype>(input, block, first + b, padded);
    float* to = value + b * block;
    Vu most = zero_words();
    COMMRT_UNROLL
    for (int i = 0; i < block; i += kLanes) {
      prefetch(from + i * size + kPrefetchBytes);
      const Vf x = load<dtype>(from + i * size);
      most = max_words(most, abs_bits(x));
      store<DType::kFloat32>(to + i, x);
    }
    absmax[b] = max_lanes(most);
  }
}

}  // namespace

void block_encode(const BlockEncodeArgs& args, std::int64_t begin, std::int64_t end) {
  const int block = args.format.block;
  for_each_tile(block, begin, end, [&](std::int64_t first, int count) {
    TileBuffer value;
    std::uint32_t absmax[kMaxTileBlocks];
    with_dtype(args.input.dtype, [&]<DType dtype>() {
      load_tile<dtype>(args.input, block, first, count, value.value, absmax);
    });
    const TileScales scales =
        choose_scales(value.value, absmax, count, args.format, &args.input, first);
    const TileRounding rounding =
        tile_rounding(args.rounding, Stream::kCodes, args.input, block, first);
    with_bits(args.format.bits, [&]<int bits>() {
      encode_tile<bits>(value.value, block, count, scales, rounding, args.payload, first);
    });
  });
}

}  // namespace commrt::COMMRT_ISA
