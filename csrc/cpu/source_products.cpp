#include "source_values.h"

namespace commrt::COMMRT_ISA {
namespace {

constexpr int kProductLanes = 16;

struct Sums {
  double lane[kNumProducts][kProductLanes] = {};
};

// `count` elements, at most a lane each.
template <typename Previous, typename Own>
COMMRT_INLINE void add_products(Floats update, Previous previous, Own own, std::int64_t at,
                                int count, Sums& sums) {
  for (int k = 0; k < count; ++k) {
    const double x = previous[at + k], y = own[at + k], z = update[at + k];
    sums.lane[0][k] += x * x;
    sums.lane[1][k] += x * y;
    sums.lane[2][k] += y * y;
    sums.lane[3][k] += x * z;
    sums.lane[4][k] += y * z;
    sums.lane[5][k] += z * z;
  }
}

template <typename Previous, typename Own>
COMMRT_PHASE void multiply(Floats update, Previous previous, Own own, std::int64_t count,
                           double* products) {
  Sums sums;
  std::int64_t i = 0;
  for (; i + kProductLanes <= count; i += kProductLanes) {
    add_products(update, previous, own, i, kProductLanes, sums);
  }
  add_products(update, previous, own, i, static_cast<int>(count - i), sums);
  for (int which = 0; which < kNumProducts; ++which) {
    double* lane = sums.lane[which];
    for (int width = kProductLanes / 2; width > 0; width /= 2) {
      for (int k = 0; k < width; ++k) lane[k] += lane[k + width];
    }
    products[which] = lane[0];
  }
}

}  // namespace

void source_products(const SourceProductsArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t index = begin; index < end; ++index) {
    const auto group = static_cast<int>(index);
    const std::int64_t from = group == 0 ? 0 : part_end(args.groups, group - 1, 0, args.numel);
    const std::int64_t to = part_end(args.groups, group, from, args.numel);
    with_values(args.previous, from, [&](auto previous) {
      with_values(args.own, from, [&](auto own) {
        multiply(Floats{args.update + from}, previous, own, to - from,
                 args.products + kNumProducts * index);
      });
    });
  }
}

}  // namespace commrt::COMMRT_ISA
