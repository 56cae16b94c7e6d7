#include "polar_bits.h"

namespace commrt::COMMRT_ISA {

void polar_transform(const PolarTransformArgs& args, std::int64_t begin, std::int64_t end) {
  const int n = 1 << args.log2_size;
  for (std::int64_t block = begin; block < end; ++block) {
    std::uint8_t* bits = args.bits + block * n;
    for (int i = 0; i < n; ++i) bits[i] &= 1;
    transform(bits, n);
  }
}

}  // namespace commrt::COMMRT_ISA
