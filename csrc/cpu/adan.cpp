#include "step.h"

namespace commrt::COMMRT_ISA {

void adan(const StepList& list, std::int64_t begin, std::int64_t end) {
  step_segments<AdanRule>(list, begin, end);
}

}  // namespace commrt::COMMRT_ISA
