#include "payload_stack.h"

namespace commrt::COMMRT_ISA {
namespace {

template <DType dtype, int bits>
void average_blocks(const DecodeAverageArgs& args, std::int64_t begin, std::int64_t end) {
  const int block = args.format.block;
  for (std::int64_t index = begin; index < end; ++index) {
    write_block<dtype>(args.output, block, index, [&](auto sink) COMMRT_INLINE_LAMBDA {
      average_block<bits>(args.payloads, block, index, sink);
    });
  }
  stream_fence();
}

}  // namespace

void decode_average(const DecodeAverageArgs& args, std::int64_t begin, std::int64_t end) {
  with_dtype(args.output.dtype, [&]<DType dtype>() {
    with_bits(args.format.bits, [&]<int bits>() { average_blocks<dtype, bits>(args, begin, end); });
  });
}

}  // namespace commrt::COMMRT_ISA
