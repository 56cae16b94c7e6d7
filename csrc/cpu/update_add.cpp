#include "../sources.h"
#include "simd.h"

namespace commrt::COMMRT_ISA {
namespace {

// Adding and taking away 1.5 * 2^52 rounds to whole numbers, nearest even, of up to 2^51.
COMMRT_PHASE void add_whole(const float* update, double factor, std::int64_t count, double* total) {
  constexpr double kShift = 0x1.8p52;
  for (std::int64_t i = 0; i < count; ++i) {
    const double product = static_cast<double>(update[i]) * factor;
    total[i] += (product + kShift) - kShift;
  }
}

}  // namespace

void update_add(const UpdateAddArgs& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t first = begin * kSourceTile;
  const std::int64_t last = end * kSourceTile < args.numel ? end * kSourceTile : args.numel;
  for (std::int64_t k = 0; k < args.count; ++k) {
    add_whole(args.updates + k * args.stride + first, args.factors[k], last - first,
              args.total + first);
  }
}

}  // namespace commrt::COMMRT_ISA
