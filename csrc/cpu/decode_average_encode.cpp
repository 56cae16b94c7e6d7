#include "payload_stack.h"

namespace commrt::COMMRT_ISA {
namespace {

// The means of a tile into `mean`, and the bits of each block's maximum magnitude.
template <int bits>
COMMRT_PHASE void average_tile(const PayloadStack& payloads, int block, std::int64_t first,
                               int count, float* mean, std::uint32_t* absmax) {
  for (int b = 0; b < count; ++b) {
    Vu most = zero_words();
    float* to = mean + b * block;
    average_block<bits>(payloads, block, first + b, [&](int i, Vf x) COMMRT_INLINE_LAMBDA {
      most = max_words(most, abs_bits(x));
      store<DType::kFloat32>(to + i, x);
    });
    absmax[b] = max_lanes(most);
  }
}

}  // namespace

void decode_average_encode(const DecodeAverageEncodeArgs& args, std::int64_t begin,
                           std::int64_t end) {
  const int block = args.format.block;
  for_each_tile(block, begin, end, [&](std::int64_t first, int count) {
    TileBuffer mean;
    std::uint32_t absmax[kMaxTileBlocks];
    with_bits(args.format.bits, [&]<int bits>() {
      average_tile<bits>(args.payloads, block, first, count, mean.value, absmax);
    });
    const TileScales scales =
        choose_scales(mean.value, absmax, count, args.output_format, nullptr, first);
    with_bits(args.output_format.bits, [&]<int bits>() {
      encode_tile<bits>(mean.value, block, count, scales, kNearest, args.output, first);
    });
  });
}

}  // namespace commrt::COMMRT_ISA
