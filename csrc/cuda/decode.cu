#include "decode.cuh"
#include "launch.cuh"

namespace commrt::cuda {

void block_decode(const BlockDecodeArgs& args, std::int64_t num_blocks, Queue queue) {
  with_bits(args.format.bits, [&]<int bits>() {
    with_rows(args.format.block, [&]<int rows>() {
      launch_tiles<rows>(&block_decode_kernel<bits, rows>, args, num_blocks, args.format, queue);
    });
  });
}

void decode_average(const DecodeAverageArgs& args, std::int64_t num_blocks, Queue queue) {
  with_bits(args.format.bits, [&]<int bits>() {
    with_rows(args.format.block, [&]<int rows>() {
      launch_tiles<rows>(&decode_average_kernel<bits, rows>, args, num_blocks, args.format, queue);
    });
  });
}

}  // namespace commrt::cuda
