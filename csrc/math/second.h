// Second moments of Adam-mini: one for a block of rows.
#pragma once

#include "../step.h"

namespace commrt {

COMMRT_HD float root(float x) {
#if defined(__CUDACC__)
  return sqrtf(x);
#else
  return __builtin_sqrtf(x);
#endif
}

// Of the scaled gradient, from the sum of the squares of the gradient as it is.
COMMRT_HD float mean_square(double sum, std::int64_t numel, float grad_multiplier) {
  const auto multiplier = static_cast<double>(grad_multiplier);
  return static_cast<float>(multiplier * multiplier * sum / static_cast<double>(numel));
}

COMMRT_HD float updated_second(float second, float mean, float beta2) {
  return beta2 * second + (1.0f - beta2) * mean;
}

// What the first moment is multiplied by.
COMMRT_HD float step_factor(float second, const StepOptions& options) {
  return options.step_size / (root(second) / options.root_correction + options.eps);
}

}  // namespace commrt
