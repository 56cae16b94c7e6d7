#include "step.h"

namespace commrt::COMMRT_ISA {

void lion(const StepList& list, std::int64_t begin, std::int64_t end) {
  step_segments<LionRule>(list, begin, end);
}

}  // namespace commrt::COMMRT_ISA
