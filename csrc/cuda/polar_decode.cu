#include "polar_decode.cuh"

namespace commrt::cuda {

void polar_decode(const PolarDecodeArgs& args, Queue queue) {
  if (args.num_blocks == 0) return;
  const std::size_t known_bytes = std::size_t{1} << args.log2_size >> 3;
  with_paths(args.paths, [&]<int paths>() {
    launch(&polar_decode_kernel<paths>, static_cast<unsigned>(args.num_blocks), paths * kWarp,
           sizeof(PolarShared<paths>) + known_bytes, queue, args);
  });
}

}  // namespace commrt::cuda
