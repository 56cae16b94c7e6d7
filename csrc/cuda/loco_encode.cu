#include "encode.cuh"
#include "launch.cuh"

namespace commrt::cuda {

void loco_encode(const LocoEncodeArgs& args, std::int64_t num_blocks, Queue queue) {
  LocoEncodeArgs cut_args = args;
  cut_args.grad = cut(args.grad, num_blocks, args.format.block);
  const bool is_small = args.residual_bits == 4;
  with_bits(args.format.bits, [&]<int bits>() {
    with_rows(args.format.block, [&]<int rows>() {
      launch_tiles<rows>(
          is_small ? &loco_encode_kernel<bits, 4, rows> : &loco_encode_kernel<bits, 8, rows>,
          cut_args, num_blocks, args.format, queue);
    });
  });
}

}  // namespace commrt::cuda
