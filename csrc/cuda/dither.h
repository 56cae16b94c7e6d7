// The ops of the dither on a GPU; see ops.h.
#pragma once

#include "../dither.h"
#include "ops.h"

namespace commrt::cuda {

void dither_quantise(const DitherQuantiseArgs& args, Queue queue);
void dither_dequantise(const DitherDequantiseArgs& args, Queue queue);
void scale_rows(const ScaleRowsArgs& args, Queue queue);
void lmmse_combine(const LmmseCombineArgs& args, Queue queue);

}  // namespace commrt::cuda
