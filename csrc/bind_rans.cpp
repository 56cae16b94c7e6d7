// The ops of rANS: addresses and sizes in, nothing out.
#include <nanobind/stl/vector.h>

#include <atomic>

#include "bind.h"
#include "cpu/dispatch.h"
#include "cpu/thread_pool.h"

namespace nb = nanobind;

namespace commrt {
namespace {

// Of vector `index` of those that lie one behind the other.
RansEncodeArgs of_vector(RansEncodeArgs args, Index index) {
  const Index elements = index * args.numel, segments = index * rans_segments(args.numel);
  args.codes += elements;
  args.rows += elements;
  args.checks += segments;
  args.words += segments * args.capacity;
  args.lengths += segments;
  if (args.escaped != nullptr) {
    args.escaped += elements;
    args.num_escaped += segments;
  }
  return args;
}
RansDecodeArgs of_vector(RansDecodeArgs args, Index index) {
  const Index elements = index * args.numel, segments = index * rans_segments(args.numel);
  args.words += segments * args.capacity;
  args.lengths += segments;
  args.rows += elements;
  args.codes += elements;
  args.checks += segments;
  args.used += segments;
  return args;
}

// On threads of the CPU, a segment at a time.
template <typename Args>
void spread(void (*kernel)(const Args&, Index, Index), const Args& args, Index vectors,
            ThreadCount threads) {
  const Index segments = rans_segments(args.numel);
  parallel_for(vectors * segments, 1, threads.count, [&](Index begin, Index end) {
    for (Index which = begin; which < end; ++which) {
      const Index segment = which % segments;
      kernel(of_vector(args, which / segments), segment, segment + 1);
    }
  });
}

void run(const RansEncodeArgs& args, Index vectors, ThreadCount threads) {
  spread(active_kernels().rans_encode, args, vectors, threads);
}
void run(const RansDecodeArgs& args, Index vectors, ThreadCount threads) {
  spread(active_kernels().rans_decode, args, vectors, threads);
}

#if defined(COMMRT_CUDA)
void run(const RansEncodeArgs& args, Index vectors, cuda::Queue queue) {
  for (Index i = 0; i < vectors; ++i) cuda::rans_encode(of_vector(args, i), queue);
}
void run(const RansDecodeArgs& args, Index vectors, cuda::Queue queue) {
  for (Index i = 0; i < vectors; ++i) cuda::rans_decode(of_vector(args, i), queue);
}
#endif

template <typename Where>
void rans_encode(Address codes, Address rows, Index vectors, Index numel, Address starts,
                 Index num_rows, int lanes, Address checks, Address words, Index capacity,
                 Address lengths, Address escaped, Address num_escaped, Where where) {
  const nb::gil_scoped_release release;
  run(RansEncodeArgs{at<const std::int16_t>(codes),
                     at<const std::int16_t>(rows),
                     numel,
                     {at<const std::uint16_t>(starts), num_rows},
                     lanes,
                     at<const std::uint16_t>(checks),
                     at<std::uint16_t>(words),
                     capacity,
                     at<std::int32_t>(lengths),
                     at<std::int16_t>(escaped),
                     at<std::int32_t>(num_escaped)},
      vectors, where);
}

template <typename Where>
void rans_decode(Address words, Index capacity, Address lengths, Address rows, Index vectors,
                 Index numel, Address starts, Index num_rows, int lanes, Address codes,
                 Address checks, Address used, Where where) {
  const nb::gil_scoped_release release;
  run(RansDecodeArgs{at<const std::uint16_t>(words),
                     capacity,
                     at<const std::int32_t>(lengths),
                     at<const std::int16_t>(rows),
                     numel,
                     {at<const std::uint16_t>(starts), num_rows},
                     lanes,
                     at<std::int16_t>(codes),
                     at<std::uint16_t>(checks),
                     at<std::int32_t>(used)},
      vectors, where);
}

// Whether all rows are there.
bool rans_count(Address codes, Address rows, Index vectors, Index numel,
                const std::vector<Index>& ends, Index num_rows, Address counts,
                ThreadCount threads) {
  const nb::gil_scoped_release release;
  std::atomic<bool> is_whole{true};
  parallel_for(static_cast<Index>(ends.size()), 1, threads.count, [&](Index begin, Index end) {
    for (Index i = 0; i < vectors; ++i) {
      const RansCountArgs args = {at<const std::int16_t>(codes) + i * numel,
                                  at<const std::int16_t>(rows) + i * numel, ends.data(), num_rows,
                                  at<std::int64_t>(counts)};
      if (!active_kernels().rans_count(args, begin, end)) is_whole = false;
    }
  });
  return is_whole;
}

template <typename Where>
void define_ops(nb::module_& m) {
  m.def("rans_encode", &rans_encode<Where>);
  m.def("rans_decode", &rans_decode<Where>);
}

}  // namespace

void bind_rans(nb::module_& m) {
  define_ops<ThreadCount>(m);
  m.def("rans_count", &rans_count);
#if defined(COMMRT_CUDA)
  define_ops<cuda::Queue>(m);
#endif
}

}  // namespace commrt
