#include "block.h"

namespace commrt::COMMRT_ISA {
namespace {

template <DType dtype, int bits>
void decode_blocks(const BlockDecodeArgs& args, std::int64_t begin, std::int64_t end) {
  const int block = args.format.block;
  for (std::int64_t index = begin; index < end; ++index) {
    const std::uint8_t* codes = args.payload.codes + index * code_bytes(bits, block);
    const Vf scale = broadcast(bf16_to_float(args.payload.scales[index]));
    write_block<dtype>(args.output, block, index, [&](auto sink) COMMRT_INLINE_LAMBDA {
      COMMRT_UNROLL
      for (int i = 0; i < block; i += kGroup) {
        prefetch(codes + i * bits / 8 + kPrefetchBytes / 4);
        const Group group = load_codes<bits>(codes + i * bits / 8);
        sink(i, mul(group.first, scale));
        sink(i + kLanes, mul(group.second, scale));
      }
    });
  }
  stream_fence();
}

}  // namespace

void block_decode(const BlockDecodeArgs& args, std::int64_t begin, std::int64_t end) {
  with_dtype(args.output.dtype, [&]<DType dtype>() {
    with_bits(args.format.bits, [&]<int bits>() { decode_blocks<dtype, bits>(args, begin, end); });
  });
}

}  // namespace commrt::COMMRT_ISA
