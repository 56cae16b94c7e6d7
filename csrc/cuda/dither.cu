#include "dither.cuh"
#include "dither.h"

namespace commrt::cuda {

namespace {

// As many threads as there are eights of the whole tensor that the window is in.
template <typename Args>
void launch_eights(void (*kernel)(Args), const Args& args, Queue queue) {
  if (args.numel == 0) return;
  const auto before = static_cast<std::int64_t>(args.dither.first_index % kPerLane);
  const std::int64_t eights = (before + args.numel + kPerLane - 1) / kPerLane;
  launch(kernel, static_cast<unsigned>((eights + kThreads - 1) / kThreads), kThreads, 0, queue,
         args);
}

}  // namespace

void dither_quantise(const DitherQuantiseArgs& args, Queue queue) {
  with_lattice(args.dither.lattice, [&]<Lattice lattice>() {
    launch_eights(&dither_quantise_kernel<lattice>, args, queue);
  });
}

void dither_dequantise(const DitherDequantiseArgs& args, Queue queue) {
  with_lattice(args.dither.lattice, [&]<Lattice lattice>() {
    launch_eights(&dither_dequantise_kernel<lattice>, args, queue);
  });
}

void scale_rows(const ScaleRowsArgs& args, Queue queue) {
  with_lattice(args.dither.lattice,
               [&]<Lattice lattice>() { launch_eights(&scale_rows_kernel<lattice>, args, queue); });
}

}  // namespace commrt::cuda
