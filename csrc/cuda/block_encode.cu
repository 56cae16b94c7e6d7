#include "encode.cuh"
#include "launch.cuh"

namespace commrt::cuda {

void block_encode(const BlockEncodeArgs& args, std::int64_t num_blocks, Queue queue) {
  BlockEncodeArgs cut_args = args;
  cut_args.input = cut(args.input, num_blocks, args.format.block);
  with_bits(args.format.bits, [&]<int bits>() {
    with_rows(args.format.block, [&]<int rows>() {
      launch_tiles<rows>(&block_encode_kernel<bits, rows>, cut_args, num_blocks, args.format,
                         queue);
    });
  });
}

}  // namespace commrt::cuda
