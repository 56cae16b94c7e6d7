// Addresses and sizes in, nothing out: commrt/ops/native.py checks the tensors and calls these.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "cpu/dispatch.h"
#include "cpu/thread_pool.h"

namespace nb = nanobind;
using namespace commrt;

namespace {

using Address = std::uintptr_t;
using Index = std::int64_t;

constexpr Index kGrainElements = 32 * 1024;  // a piece of work stays in the second-level cache

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
    const Index code_bytes = static_cast<Index>(bits) * block / 8;
    auto* scales = reinterpret_cast<std::uint16_t*>(base + total_blocks * code_bytes);
    return {base + first_block * code_bytes, scales + first_block};
  }
  PayloadStack stack(int bits, int block, Index stride, int count) const {
    const PayloadSlice first = slice(bits, block);
    return {first.codes, first.scales, stride, count};
  }
};

template <typename Args>
void run(void (*kernel)(const Args&, Index, Index), const Args& args, Index num_blocks, int block,
         int num_threads) {
  const nb::gil_scoped_release release;
  parallel_for(num_blocks, kGrainElements / block, num_threads,
               [&](Index begin, Index end) { kernel(args, begin, end); });
}

void block_encode(WindowArg input, PayloadArg payload, BlockFormat format, Rounding rounding,
                  Index num_blocks, int num_threads) {
  const BlockEncodeArgs args{input, payload.slice(format.bits, format.block), format, rounding};
  run(active_kernels().block_encode, args, num_blocks, format.block, num_threads);
}

void loco_encode(WindowArg grad, PayloadArg residual, PayloadArg payload, BlockFormat format,
                 Rounding rounding, float beta, int residual_bits, Index num_blocks,
                 int num_threads) {
  const LocoEncodeArgs args{grad,
                            residual.slice(residual_bits, format.block),
                            payload.slice(format.bits, format.block),
                            format,
                            rounding,
                            beta,
                            residual_bits};
  run(active_kernels().loco_encode, args, num_blocks, format.block, num_threads);
}

void block_decode(PayloadArg payload, WindowArg output, BlockFormat format, Index num_blocks,
                  int num_threads) {
  const BlockDecodeArgs args{payload.slice(format.bits, format.block), output, format};
  run(active_kernels().block_decode, args, num_blocks, format.block, num_threads);
}

void decode_average(PayloadArg first, Index stride, int count, WindowArg output, BlockFormat format,
                    Index num_blocks, int num_threads) {
  const DecodeAverageArgs args{first.stack(format.bits, format.block, stride, count), output,
                               format};
  run(active_kernels().decode_average, args, num_blocks, format.block, num_threads);
}

void decode_average_encode(PayloadArg first, Index stride, int count, BlockFormat format,
                           PayloadArg output, BlockFormat output_format, Index num_blocks,
                           int num_threads) {
  const DecodeAverageEncodeArgs args{first.stack(format.bits, format.block, stride, count), format,
                                     output.slice(output_format.bits, output_format.block),
                                     output_format};
  run(active_kernels().decode_average_encode, args, num_blocks, format.block, num_threads);
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

  m.def("block_encode", &block_encode);
  m.def("block_decode", &block_decode);
  m.def("loco_encode", &loco_encode);
  m.def("decode_average", &decode_average);
  m.def("decode_average_encode", &decode_average_encode);

  m.def("available_isas", &available_isas);
  m.def("select_isa", &select_isa);
  m.def("active_isa", [] { return std::string(active_kernels().isa); });
  m.def("copy_stream", &copy_stream, nb::call_guard<nb::gil_scoped_release>());
  m.def("read_all", &read_all, nb::call_guard<nb::gil_scoped_release>());
}
