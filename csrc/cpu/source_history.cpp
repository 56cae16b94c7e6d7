#include "source_values.h"

namespace commrt::COMMRT_ISA {

void source_history(const SourceHistoryArgs& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t last = end * kSourceTile;
  end = last < args.numel ? last : args.numel;
  const int mask = args.num_shares - 1;
  for (std::int64_t i = begin * kSourceTile; i < end; ++i) {
    const float predicted = args.predicted[i];
    const float share = args.shares[args.rows[i] >> 4 & mask];
    args.kept[i] = float_to_bf16((args.decoded[i] - predicted) * share + predicted);
  }
}

}  // namespace commrt::COMMRT_ISA
