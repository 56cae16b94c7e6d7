#include "payload_stack.h"

namespace commrt::COMMRT_ISA {
namespace {

template <int bits, int output_bits>
COMMRT_INLINE void recode_tile(const DecodeAverageEncodeArgs& args, std::int64_t first, int count) {
  const int block = args.format.block;
  TileBuffer value;
  std::uint32_t absmax[kMaxTileBlocks];
  for (int b = 0; b < count; ++b) {
    Vu most = zero_words();
    float* mean = value.value + b * block;
    average_block<bits>(args.payloads, block, first + b, [&](int i, Vf x) COMMRT_INLINE_LAMBDA {
      most = max_words(most, abs_bits(x));
      store<DType::kFloat32>(mean + i, x);
    });
    absmax[b] = max_lanes(most);
  }
  std::uint16_t* scales = args.output.scales + first;
  for (int b = 0; b < count; ++b) {
    scales[b] = choose_scale(value.value + b * block, block, absmax[b], args.output_format);
  }
  for (int b = 0; b < count; ++b) {
    encode_values<output_bits>(value.value + b * block, block, scales[b], nullptr,
                               args.output.codes + (first + b) * code_bytes(output_bits, block));
  }
}

}  // namespace

void decode_average_encode(const DecodeAverageEncodeArgs& args, std::int64_t begin,
                           std::int64_t end) {
  with_bits(args.format.bits, [&]<int bits>() {
    with_bits(args.output_format.bits, [&]<int output_bits>() {
      for_each_tile(args.format.block, begin, end, [&](std::int64_t first, int count) {
        recode_tile<bits, output_bits>(args, first, count);
      });
    });
  });
}

}  // namespace commrt::COMMRT_ISA
