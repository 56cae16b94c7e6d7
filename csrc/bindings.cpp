// Addresses and sizes in, nothing out: commrt/ops/native checks the tensors and calls these.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <iterator>
#include <stdexcept>

#include "bind.h"
#include "cpu/dispatch.h"
#include "cpu/thread_pool.h"

namespace nb = nanobind;
using namespace commrt;

namespace {

// (address, dtype, elements, index in the whole tensor of the first one)
struct WindowArg : Window {
  WindowArg(Address address, int dtype_code, Index elements, std::uint64_t first)
      : Window{reinterpret_cast<void*>(address), static_cast<DType>(dtype_code), elements, first} {}
};

// (address, blocks in the payload, first block to touch): all codes come first, then all scales.
struct PayloadArg {
  Address address;
  Index total_blocks;
  Index first_block;

  PayloadSlice slice(int bits, int block) const {
    auto* base = reinterpret_cast<std::uint8_t*>(address);
    auto* scales = reinterpret_cast<std::uint16_t*>(base + total_blocks * code_bytes(bits, block));
    return {base + first_block * code_bytes(bits, block), scales + first_block};
  }
  PayloadStack stack(int bits, int block, Index stride, int count) const {
    const PayloadSlice first = slice(bits, block);
    return {first.codes, first.scales, stride, count};
  }
};

// Addresses of a step's tensor; see commrt/ops/native.
struct StepTensorArg : StepTensor {
  StepTensorArg(Address grad, int grad_dtype, Address weights, int weight_dtype, Address extra,
                int weight_format, Index rows, Index cols,
                const std::vector<std::pair<Address, Address>>& moments, int storage,
                bool stochastic, std::uint64_t seed, std::uint64_t first_index,
                std::uint64_t index_stride, Address second, int second_from, Index block_rows)
      : StepTensor{reinterpret_cast<const void*>(grad),
                   static_cast<DType>(grad_dtype),
                   reinterpret_cast<void*>(weights),
                   static_cast<DType>(weight_dtype),
                   reinterpret_cast<void*>(extra),
                   static_cast<WeightFormat>(weight_format),
                   rows,
                   cols,
                   {},
                   static_cast<Storage>(storage),
                   stochastic,
                   seed,
                   first_index,
                   index_stride,
                   reinterpret_cast<float*>(second),
                   static_cast<Second>(second_from),
                   block_rows} {
    for (std::size_t k = 0; k < moments.size() && k < kMaxMoments; ++k) {
      const auto& [values, scales] = moments[k];
      this->moments[k] = {reinterpret_cast<void*>(values), reinterpret_cast<float*>(scales)};
    }
  }
};

struct SquaresTensorArg : SquaresTensor {
  SquaresTensorArg(Address grad, int dtype, Index rows, Index cols, Address sums, bool by_column)
      : SquaresTensor{reinterpret_cast<const void*>(grad),
                      static_cast<DType>(dtype),
                      rows,
                      cols,
                      reinterpret_cast<double*>(sums),
                      by_column} {}
};

struct StepOptionsArg : StepOptions {
  StepOptionsArg(const std::vector<double>& values, Address grad_factor) : StepOptions{} {
    float* const fields[] = {&beta1,           &beta2,     &beta3,           &eps,
                             &decay,           &step_size, &difference_size, &has_before,
                             &root_correction, &grad_scale};
    if (values.size() != std::size(fields)) throw std::invalid_argument("options of a step");
    for (std::size_t i = 0; i < values.size(); ++i) *fields[i] = static_cast<float>(values[i]);
    this->grad_factor = reinterpret_cast<const float*>(grad_factor);
  }
};

Index units_of(const StepTensor& tensor, bool has_rows) {
  const Index rows_each = rows_per_unit(tensor.cols, tensor.block_rows);
  if (has_rows) return (tensor.rows + rows_each - 1) / rows_each;
  constexpr Index kSegments = kUnitElements / kSegment;
  return (tensor.rows * segments_per_row(tensor) + kSegments - 1) / kSegments;
}

Index units_of(const SquaresTensor& tensor) {
  const Index rows_each = rows_per_unit(tensor.cols, 1);
  return tensor.by_column ? (tensor.cols + kSegment - 1) / kSegment
                          : (tensor.rows + rows_each - 1) / rows_each;
}

// Where an op runs: on threads of the CPU, or queued on a GPU's stream.
struct Threads : ThreadCount {
  void run(const BlockEncodeArgs& args, Index num_blocks) const {
    spread(active_kernels().block_encode, args, num_blocks, args.format.block);
  }
  void run(const BlockDecodeArgs& args, Index num_blocks) const {
    spread(active_kernels().block_decode, args, num_blocks, args.format.block);
  }
  void run(const LocoEncodeArgs& args, Index num_blocks) const {
    spread(active_kernels().loco_encode, args, num_blocks, args.format.block);
  }
  void run(const DecodeAverageArgs& args, Index num_blocks) const {
    spread(active_kernels().decode_average, args, num_blocks, args.format.block);
  }
  void run(const DecodeAverageEncodeArgs& args, Index num_blocks) const {
    spread(active_kernels().decode_average_encode, args, num_blocks, args.format.block);
  }
  void run(const RescaleArgs& args, Index num_blocks) const {
    spread(active_kernels().rescale, args, num_blocks, 1);
  }
  // Whether the payload is whole: false leaves the groups as they are whose part is not.
  bool run(const PatchApplyArgs& args) const {
    std::atomic<bool> is_whole{true};
    parallel_for(patch_groups(args.numel), kPieceGroups, count, [&](Index begin, Index end) {
      if (!active_kernels().patch_apply(args, begin, end)) is_whole = false;
    });
    return is_whole;
  }

  // One list of work over all tensors, so that threads meet once and not once a tensor.
  template <typename List>
  void run_list(void (*kernel)(const List&, Index, Index), List list,
                const std::vector<Index>& first_unit) const {
    list.first_unit = first_unit.data();
    parallel_for(first_unit.back(), 1, count,
                 [&](Index begin, Index end) { kernel(list, begin, end); });
  }
  void adam_mini(const StepList& list) const {
    run_list(active_kernels().adam_mini, list,
             first_units(list, [](const auto& tensor) { return units_of(tensor, true); }));
  }
  void adamw(const StepList& list) const { run_segments(active_kernels().adamw, list); }
  void mofo(const StepList& list) const { run_segments(active_kernels().mofo, list); }
  void lion(const StepList& list) const { run_segments(active_kernels().lion, list); }
  void adan(const StepList& list) const { run_segments(active_kernels().adan, list); }
  void square_sums(const SquaresList& list) const {
    run_list(active_kernels().square_sums, list,
             first_units(list, [](const auto& tensor) { return units_of(tensor); }));
  }

 private:
  template <typename List, typename Units>
  static std::vector<Index> first_units(const List& list, Units units) {
    std::vector<Index> first = {0};
    for (int i = 0; i < list.count; ++i) first.push_back(first.back() + units(list.tensors[i]));
    return first;
  }
  void run_segments(void (*kernel)(const StepList&, Index, Index), const StepList& list) const {
    run_list(kernel, list,
             first_units(list, [](const auto& tensor) { return units_of(tensor, false); }));
  }

  template <typename Args>
  void spread(void (*kernel)(const Args&, Index, Index), const Args& args, Index num_blocks,
              int elements_each) const {
    parallel_for(num_blocks, kGrainElements / elements_each, count,
                 [&](Index begin, Index end) { kernel(args, begin, end); });
  }
};

#if defined(COMMRT_CUDA)
struct Queue : cuda::Queue {
  void run(const BlockEncodeArgs& args, Index num_blocks) const {
    cuda::block_encode(args, num_blocks, *this);
  }
  void run(const BlockDecodeArgs& args, Index num_blocks) const {
    cuda::block_decode(args, num_blocks, *this);
  }
  void run(const LocoEncodeArgs& args, Index num_blocks) const {
    cuda::loco_encode(args, num_blocks, *this);
  }
  void run(const DecodeAverageArgs& args, Index num_blocks) const {
    cuda::decode_average(args, num_blocks, *this);
  }
  void run(const DecodeAverageEncodeArgs& args, Index num_blocks) const {
    cuda::decode_average_encode(args, num_blocks, *this);
  }
  void run(const RescaleArgs& args, Index num_blocks) const {
    cuda::rescale(args, num_blocks, *this);
  }
  bool run(const PatchApplyArgs& args) const {
    cuda::patch_apply(args, *this);
    return true;  // what is in the payload is not known here
  }
  void adam_mini(const StepList& list) const { cuda::adam_mini(list, *this); }
  void adamw(const StepList& list) const { cuda::adamw(list, *this); }
  void mofo(const StepList& list) const { cuda::mofo(list, *this); }
  void lion(const StepList& list) const { cuda::lion(list, *this); }
  void adan(const StepList& list) const { cuda::adan(list, *this); }
  void square_sums(const SquaresList& list) const { cuda::square_sums(list, *this); }
};
#endif

template <typename Where>
void block_encode(WindowArg input, PayloadArg payload, BlockFormat format, Rounding rounding,
                  Index num_blocks, Where where) {
  const nb::gil_scoped_release release;
  const PayloadSlice to = payload.slice(format.bits, format.block);
  where.run(BlockEncodeArgs{input, to, format, rounding}, num_blocks);
}

template <typename Where>
void loco_encode(WindowArg grad, PayloadArg residual, PayloadArg payload, BlockFormat format,
                 Rounding rounding, float beta, int residual_bits, Index num_blocks, Where where) {
  const nb::gil_scoped_release release;
  const PayloadSlice kept = residual.slice(residual_bits, format.block);
  const PayloadSlice to = payload.slice(format.bits, format.block);
  where.run(LocoEncodeArgs{grad, kept, to, format, rounding, beta, residual_bits}, num_blocks);
}

template <typename Where>
void block_decode(PayloadArg payload, WindowArg output, BlockFormat format, Index num_blocks,
                  Where where) {
  const nb::gil_scoped_release release;
  const PayloadSlice from = payload.slice(format.bits, format.block);
  where.run(BlockDecodeArgs{from, output, format}, num_blocks);
}

template <typename Where>
void decode_average(PayloadArg first, Index stride, int count, WindowArg output, BlockFormat format,
                    Index num_blocks, Where where) {
  const nb::gil_scoped_release release;
  const PayloadStack from = first.stack(format.bits, format.block, stride, count);
  where.run(DecodeAverageArgs{from, output, format}, num_blocks);
}

template <typename Where>
void decode_average_encode(PayloadArg first, Index stride, int count, BlockFormat format,
                           PayloadArg output, BlockFormat output_format, Index num_blocks,
                           Where where) {
  const nb::gil_scoped_release release;
  const PayloadStack from = first.stack(format.bits, format.block, stride, count);
  const PayloadSlice to = output.slice(output_format.bits, output_format.block);
  where.run(DecodeAverageEncodeArgs{from, format, to, output_format}, num_blocks);
}

template <typename Where>
void rescale(PayloadArg payload, Address ratio, BlockFormat format, Where where) {
  const nb::gil_scoped_release release;
  const PayloadSlice slice = payload.slice(format.bits, format.block);
  const RescaleArgs args{slice.scales, reinterpret_cast<const float*>(ratio), format.bits};
  where.run(args, payload.total_blocks);
}

// On threads of the CPU only.
void patch_encode(Address after, Address before, int element_size, Index numel, Address payload,
                  Threads threads) {
  const nb::gil_scoped_release release;
  const PatchEncodeArgs args{reinterpret_cast<const void*>(after),
                             reinterpret_cast<const void*>(before), element_size, numel,
                             reinterpret_cast<std::uint8_t*>(payload)};
  encode_patch(args, active_kernels().patch_encode, [&](Index groups, const auto& encode_piece) {
    parallel_for(groups, kPieceGroups, threads.count, encode_piece);
  });
}

template <typename Where>
bool patch_apply(Address weights, int element_size, Index numel, Address payload,
                 Index payload_bytes, Where where) {
  const nb::gil_scoped_release release;
  return where.run(PatchApplyArgs{reinterpret_cast<void*>(weights), element_size, numel,
                                  reinterpret_cast<const std::uint8_t*>(payload), payload_bytes});
}

template <typename Where, void (Where::*op)(const StepList&) const>
void step(const std::vector<StepTensorArg>& given, StepOptionsArg options, Where where) {
  const nb::gil_scoped_release release;
  const std::vector<StepTensor> tensors(given.begin(), given.end());
  (where.*op)({tensors.data(), nullptr, static_cast<int>(tensors.size()), options});
}

template <typename Where>
void square_sums(const std::vector<SquaresTensorArg>& given, Where where) {
  const nb::gil_scoped_release release;
  const std::vector<SquaresTensor> tensors(given.begin(), given.end());
  where.square_sums({tensors.data(), nullptr, static_cast<int>(tensors.size())});
}

template <typename Where>
void define_ops(nb::module_& m) {
  m.def("block_encode", &block_encode<Where>);
  m.def("block_decode", &block_decode<Where>);
  m.def("loco_encode", &loco_encode<Where>);
  m.def("decode_average", &decode_average<Where>);
  m.def("decode_average_encode", &decode_average_encode<Where>);
  m.def("rescale", &rescale<Where>);
  m.def("patch_apply", &patch_apply<Where>);
  m.def("adam_mini", &step<Where, &Where::adam_mini>);
  m.def("adamw", &step<Where, &Where::adamw>);
  m.def("mofo", &step<Where, &Where::mofo>);
  m.def("lion", &step<Where, &Where::lion>);
  m.def("adan", &step<Where, &Where::adan>);
  m.def("square_sums", &square_sums<Where>);
}

void copy_stream(Address from, Address to, Index numel) {
  active_kernels().copy_stream(reinterpret_cast<const float*>(from), reinterpret_cast<float*>(to),
                               numel);
}

float read_all(Address from, Index numel) {
  return active_kernels().read(reinterpret_cast<const float*>(from), numel);
}

}  // namespace

NB_MODULE(_C, m) {
  nb::class_<WindowArg>(m, "Window").def(nb::init<Address, int, Index, std::uint64_t>());
  nb::class_<PayloadArg>(m, "Payload").def(nb::init<Address, Index, Index>());
  nb::class_<BlockFormat>(m, "BlockFormat").def(nb::init<int, int, bool>());
  nb::class_<Rounding>(m, "Rounding").def(nb::init<bool, std::uint64_t>());

  nb::class_<StepTensorArg>(m, "StepTensor")
      .def(nb::init<Address, int, Address, int, Address, int, Index, Index,
                    const std::vector<std::pair<Address, Address>>&, int, bool, std::uint64_t,
                    std::uint64_t, std::uint64_t, Address, int, Index>());
  nb::class_<SquaresTensorArg>(m, "SquaresTensor")
      .def(nb::init<Address, int, Index, Index, Address, bool>());
  nb::class_<StepOptionsArg>(m, "StepOptions").def(nb::init<const std::vector<double>&, Address>());

  nb::class_<ThreadCount>(m, "ThreadCount");
  nb::class_<Threads, ThreadCount>(m, "Threads").def(nb::init<int>());
  define_ops<Threads>(m);
  m.def("patch_encode", &patch_encode);

  // "none", "nvcc", or "shim", which takes addresses of the CPU.
  m.attr("cuda") = COMMRT_CUDA_NAME;
#if defined(COMMRT_CUDA)
  nb::class_<cuda::Queue>(m, "DeviceQueue");
  nb::class_<Queue, cuda::Queue>(m, "Queue").def(nb::init<std::uintptr_t>());
  define_ops<Queue>(m);
  m.def("cuda_device_count", &cuda::device_count);
#endif

  bind_dither(m);
  bind_rans(m);
  bind_polar(m);
  bind_sources(m);
  bind_updates(m);

  m.def("available_isas", &available_isas);
  m.def("select_isa", &select_isa);
  m.def("active_isa", [] { return std::string(active_kernels().isa); });
  m.def("copy_stream", &copy_stream, nb::call_guard<nb::gil_scoped_release>());
  m.def("read_all", &read_all, nb::call_guard<nb::gil_scoped_release>());
}
