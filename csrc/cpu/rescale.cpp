#include "block.h"

namespace commrt::COMMRT_ISA {

void rescale(const RescaleArgs& args, std::int64_t begin, std::int64_t end) {
  const float ratio = *args.ratio;
  for (std::int64_t index = begin; index < end; ++index) {
    args.scales[index] = rescaled(args.scales[index], ratio, args.bits);
  }
}

}  // namespace commrt::COMMRT_ISA
