#include "step.h"

namespace commrt::COMMRT_ISA {

void mofo(const StepList& list, std::int64_t begin, std::int64_t end) {
  step_segments<MofoRule>(list, begin, end);
}

}  // namespace commrt::COMMRT_ISA
