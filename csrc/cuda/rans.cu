#include "launch.cuh"
#include "rans.cuh"

namespace commrt::cuda {
namespace {

template <typename Args>
void launch_segments(void (*kernel)(Args), const Args& args, Queue queue) {
  const std::int64_t segments = rans_segments(args.numel);
  if (segments == 0) return;
  launch(kernel, static_cast<unsigned>(segments), kWarp, 0, queue, args);
}

}  // namespace

void rans_encode(const RansEncodeArgs& args, Queue queue) {
  launch_segments(&rans_encode_kernel<kWarp>, args, queue);
}

void rans_decode(const RansDecodeArgs& args, Queue queue) {
  launch_segments(&rans_decode_kernel<kWarp>, args, queue);
}

}  // namespace commrt::cuda
