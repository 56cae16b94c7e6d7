#include "source_values.h"

namespace commrt::COMMRT_ISA {
namespace {

template <typename Previous, typename Own>
COMMRT_PHASE void predict(Previous previous, Own own, const float* weights, std::int64_t count,
                          float* predicted) {
  const float first = weights[0], second = weights[1];
  for (std::int64_t i = 0; i < count; ++i) {
    const float total = (0.0f + first * previous[i]) + second * own[i];
    predicted[i] = clamp_between(total, -kMostPredicted, kMostPredicted);
  }
}

}  // namespace

void source_prediction(const SourcePredictionArgs& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t first = begin * kSourceTile, last = end * kSourceTile;
  const auto predict_part = [&](int group, std::int64_t from, std::int64_t to) {
    with_values(args.previous, from, [&](auto previous) {
      with_values(args.own, from, [&](auto own) {
        predict(previous, own, args.weights + 2 * group, to - from, args.predicted + from);
      });
    });
  };
  for_each_part(args.groups, first, last < args.numel ? last : args.numel, predict_part);
}

}  // namespace commrt::COMMRT_ISA
