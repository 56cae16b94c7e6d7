#include "decode.cuh"
#include "launch.cuh"

namespace commrt::cuda {

void decode_average_encode(const DecodeAverageEncodeArgs& args, std::int64_t num_blocks,
                           Queue queue) {
  with_bits(args.format.bits, [&]<int bits>() {
    with_bits(args.output_format.bits, [&]<int output_bits>() {
      with_rows(args.format.block, [&]<int rows>() {
        launch_tiles<rows>(&decode_average_encode_kernel<bits, output_bits, rows>, args, num_blocks,
                           args.output_format, queue);
      });
    });
  });
}

}  // namespace commrt::cuda
