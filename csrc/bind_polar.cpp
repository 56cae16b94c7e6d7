// The ops of polar codes and cosets: addresses and sizes in, nothing out.
#include "bind.h"
#include "cpu/dispatch.h"
#include "cpu/thread_pool.h"
#include "cuda/polar.h"

namespace nb = nanobind;

namespace commrt {
namespace {

// On threads of the CPU, a few blocks or tiles at a time.
template <typename Args>
void spread(void (*kernel)(const Args&, Index, Index), const Args& args, Index units,
            Index elements_each, ThreadCount threads) {
  const Index grain = kGrainElements / elements_each;
  parallel_for(units, grain > 0 ? grain : 1, threads.count,
               [&](Index begin, Index end) { kernel(args, begin, end); });
}

Index tiles_of(Index numel) { return (numel + kCosetTile - 1) / kCosetTile; }

void run(const PolarTransformArgs& args, ThreadCount threads) {
  spread(active_kernels().polar_transform, args, args.num_blocks, Index{1} << args.log2_size,
         threads);
}
void run(const PolarDecodeArgs& args, ThreadCount threads) {
  spread(active_kernels().polar_decode, args, args.num_blocks, Index{1} << args.log2_size, threads);
}
void run(const CosetLlrArgs& args, ThreadCount threads) {
  spread(active_kernels().coset_llr, args, tiles_of(args.numel), kCosetTile, threads);
}
void run(const CosetDecodeArgs& args, ThreadCount threads) {
  spread(active_kernels().coset_decode, args, tiles_of(args.numel), kCosetTile, threads);
}

#if defined(COMMRT_CUDA)
void run(const PolarTransformArgs& args, cuda::Queue queue) { cuda::polar_transform(args, queue); }
void run(const PolarDecodeArgs& args, cuda::Queue queue) { cuda::polar_decode(args, queue); }
void run(const CosetLlrArgs& args, cuda::Queue queue) { cuda::coset_llr(args, queue); }
void run(const CosetDecodeArgs& args, cuda::Queue queue) { cuda::coset_decode(args, queue); }
#endif

template <typename Where>
void polar_transform(Address bits, Index num_blocks, int log2_size, Where where) {
  const nb::gil_scoped_release release;
  run(PolarTransformArgs{at<std::uint8_t>(bits), num_blocks, log2_size}, where);
}

template <typename Where>
void polar_decode(Address llr, Address known, Index known_stride, Address values, Address bits,
                  Address scratch, Index num_blocks, int log2_size, int paths, Where where) {
  const nb::gil_scoped_release release;
  run(PolarDecodeArgs{at<const float>(llr), at<const std::uint8_t>(known), known_stride,
                      at<const std::uint8_t>(values), at<std::uint8_t>(bits), at<float>(scratch),
                      num_blocks, log2_size, paths},
      where);
}

template <typename Where>
void coset_llr(Address position, Address known, float inverse_place, Address table, int table_size,
               Address llr, Index numel, Where where) {
  const nb::gil_scoped_release release;
  run(CosetLlrArgs{at<const float>(position), at<const std::int16_t>(known), inverse_place,
                   at<const float>(table), table_size, at<float>(llr), numel},
      where);
}

template <typename Where>
void coset_decode(Address position, Address residues, int modulus, Address codes, Index numel,
                  Where where) {
  const nb::gil_scoped_release release;
  const auto divisor = static_cast<float>(modulus);
  run(CosetDecodeArgs{at<const float>(position), at<const std::int16_t>(residues), divisor,
                      1.0f / divisor, at<std::int16_t>(codes), numel},
      where);
}

template <typename Where>
void define_ops(nb::module_& m) {
  m.def("polar_transform", &polar_transform<Where>);
  m.def("polar_decode", &polar_decode<Where>);
  m.def("coset_llr", &coset_llr<Where>);
  m.def("coset_decode", &coset_decode<Where>);
}

}  // namespace

void bind_polar(nb::module_& m) {
  define_ops<ThreadCount>(m);
#if defined(COMMRT_CUDA)
  define_ops<cuda::Queue>(m);
#endif
}

}  // namespace commrt
