#include "coset.cuh"

namespace commrt::cuda {
namespace {

template <typename Args>
void launch_elements(void (*kernel)(Args), const Args& args, Queue queue) {
  const std::int64_t blocks = (args.numel + kCosetThreads - 1) / kCosetThreads;
  if (blocks > 0) launch(kernel, static_cast<unsigned>(blocks), kCosetThreads, 0, queue, args);
}

}  // namespace

void coset_llr(const CosetLlrArgs& args, Queue queue) {
  launch_elements(&coset_llr_kernel<CosetLlrArgs>, args, queue);
}

void coset_decode(const CosetDecodeArgs& args, Queue queue) {
  launch_elements(&coset_decode_kernel<CosetDecodeArgs>, args, queue);
}

}  // namespace commrt::cuda
