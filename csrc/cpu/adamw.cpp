#include "step.h"

namespace commrt::COMMRT_ISA {

void adamw(const StepList& list, std::int64_t begin, std::int64_t end) {
  step_segments<AdamWRule>(list, begin, end);
}

}  // namespace commrt::COMMRT_ISA
