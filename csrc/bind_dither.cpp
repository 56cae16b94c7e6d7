// The ops of the dither: addresses and sizes in, nothing out.
#include "bind.h"
#include "cpu/dispatch.h"
#include "cpu/thread_pool.h"
#include "cuda/dither.h"

namespace nb = nanobind;

namespace commrt {
namespace {

struct DitherArg : Dither {
  DitherArg(int lattice, std::uint64_t seed, std::uint64_t first_index)
      : Dither{static_cast<Lattice>(lattice), seed, first_index} {}
};

// On threads of the CPU, in tiles.
template <typename Args>
void spread(void (*kernel)(const Args&, Index, Index), const Args& args, ThreadCount threads) {
  const Index tiles = (args.numel + kDitherTile - 1) / kDitherTile;
  parallel_for(tiles, kGrainElements / kDitherTile, threads.count,
               [&](Index begin, Index end) { kernel(args, begin, end); });
}

void run(const DitherQuantiseArgs& args, ThreadCount threads) {
  spread(active_kernels().dither_quantise, args, threads);
}
void run(const DitherDequantiseArgs& args, ThreadCount threads) {
  spread(active_kernels().dither_dequantise, args, threads);
}
void run(const ScaleRowsArgs& args, ThreadCount threads) {
  spread(active_kernels().scale_rows, args, threads);
}
void run(const LmmseCombineArgs& args, ThreadCount threads) {
  spread(active_kernels().lmmse_combine, args, threads);
}

#if defined(COMMRT_CUDA)
void run(const DitherQuantiseArgs& args, cuda::Queue queue) { cuda::dither_quantise(args, queue); }
void run(const DitherDequantiseArgs& args, cuda::Queue queue) {
  cuda::dither_dequantise(args, queue);
}
void run(const ScaleRowsArgs& args, cuda::Queue queue) { cuda::scale_rows(args, queue); }
void run(const LmmseCombineArgs& args, cuda::Queue queue) { cuda::lmmse_combine(args, queue); }
#endif

template <typename Where>
void dither_quantise(Address values, Address predicted, Address codes, Index numel, float step,
                     DitherArg dither, Where where) {
  const nb::gil_scoped_release release;
  run(DitherQuantiseArgs{at<const float>(values), at<const float>(predicted),
                         at<std::int16_t>(codes), numel, step, dither},
      where);
}

template <typename Where>
void dither_dequantise(Address codes, Address predicted, Address values, Index numel, float step,
                       DitherArg dither, Where where) {
  const nb::gil_scoped_release release;
  run(DitherDequantiseArgs{at<const std::int16_t>(codes), at<const float>(predicted),
                           at<float>(values), numel, step, dither},
      where);
}

template <typename Where>
void scale_rows(Address energies, Address rows_of_class, int num_classes, Address ends,
                int num_groups, int base, Address contexts, Address rows, Index numel,
                DitherArg dither, Where where) {
  const nb::gil_scoped_release release;
  run(ScaleRowsArgs{at<const float>(energies),
                    at<const std::int16_t>(rows_of_class),
                    num_classes,
                    {at<const std::int64_t>(ends), num_groups},
                    base,
                    at<std::int16_t>(contexts),
                    at<std::int16_t>(rows),
                    numel,
                    dither},
      where);
}

template <typename Where>
void lmmse_combine(Address stack, Index stride, int count, Address weights, Address out,
                   Index numel, Where where) {
  const nb::gil_scoped_release release;
  run(LmmseCombineArgs{at<const float>(stack), stride, count, at<const float>(weights),
                       at<float>(out), numel},
      where);
}

template <typename Where>
void define_ops(nb::module_& m) {
  m.def("dither_quantise", &dither_quantise<Where>);
  m.def("dither_dequantise", &dither_dequantise<Where>);
  m.def("scale_rows", &scale_rows<Where>);
  m.def("lmmse_combine", &lmmse_combine<Where>);
}

}  // namespace

void bind_dither(nb::module_& m) {
  nb::class_<DitherArg>(m, "Dither").def(nb::init<int, std::uint64_t, std::uint64_t>());
  define_ops<ThreadCount>(m);
#if defined(COMMRT_CUDA)
  define_ops<cuda::Queue>(m);
#endif
}

}  // namespace commrt
