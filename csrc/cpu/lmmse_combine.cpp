#include "dither_lanes.h"

namespace commrt::COMMRT_ISA {
namespace {

constexpr int kRowsAtOnce = 8;  // so that sums are not loaded and stored for every row

// Adds `rows` weighted rows to the sums of `count` elements, one after the other.
template <int rows>
COMMRT_PHASE void add_rows(const float* from, std::int64_t stride, const float* weights, int count,
                           float* sums) {
  Vf weight[rows];
  for (int row = 0; row < rows; ++row) weight[row] = broadcast(weights[row]);
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Vf sum = load<DType::kFloat32>(sums + i);
    for (int row = 0; row < rows; ++row) {
      sum = fused(weight[row], load<DType::kFloat32>(from + row * stride + i), sum);
    }
    store<DType::kFloat32>(sums + i, sum);
  }
  for (; i < count; ++i) {
    for (int row = 0; row < rows; ++row) {
      sums[i] = __builtin_fmaf(weights[row], from[row * stride + i], sums[i]);
    }
  }
}

}  // namespace

void lmmse_combine(const LmmseCombineArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t tile = begin; tile < end; ++tile) {
    const std::int64_t first = tile * kDitherTile, left = args.numel - first;
    const int count = static_cast<int>(left < kDitherTile ? left : kDitherTile);
    alignas(64) float sums[kDitherTile] = {};
    const float* from = args.stack + first;
    int row = 0;
    for (; row + kRowsAtOnce <= args.count; row += kRowsAtOnce) {
      add_rows<kRowsAtOnce>(from + row * args.stride, args.stride, args.weights + row, count, sums);
    }
    for (; row < args.count; ++row) {
      add_rows<1>(from + row * args.stride, args.stride, args.weights + row, count, sums);
    }
    std::memcpy(args.out + first, sums, sizeof(float) * static_cast<std::size_t>(count));
  }
}

}  // namespace commrt::COMMRT_ISA
