// The polar ops on a GPU; see ops.h.
#pragma once

#include "../polar.h"
#include "ops.h"

namespace commrt::cuda {

void polar_transform(const PolarTransformArgs& args, Queue queue);
void polar_decode(const PolarDecodeArgs& args, Queue queue);
void coset_llr(const CosetLlrArgs& args, Queue queue);
void coset_decode(const CosetDecodeArgs& args, Queue queue);

}  // namespace commrt::cuda
