// The ops on a GPU: queued on a stream, without allocating or waiting. Pointers are the device's.
#pragma once

#include "../ops.h"
#include "../rans.h"
#include "../step.h"

namespace commrt::cuda {

// A stream of the current device, as torch.cuda.Stream.cuda_stream.
struct Queue {
  std::uintptr_t stream;
};

void block_encode(const BlockEncodeArgs& args, std::int64_t num_blocks, Queue queue);
void block_decode(const BlockDecodeArgs& args, std::int64_t num_blocks, Queue queue);
void loco_encode(const LocoEncodeArgs& args, std::int64_t num_blocks, Queue queue);
void decode_average(const DecodeAverageArgs& args, std::int64_t num_blocks, Queue queue);
void decode_average_encode(const DecodeAverageEncodeArgs& args, std::int64_t num_blocks,
                           Queue queue);
void rescale(const RescaleArgs& args, std::int64_t num_blocks, Queue queue);
void patch_apply(const PatchApplyArgs& args, Queue queue);
void rans_encode(const RansEncodeArgs& args, Queue queue);
void rans_decode(const RansDecodeArgs& args, Queue queue);

void adam_mini(const StepList& list, Queue queue);
void adamw(const StepList& list, Queue queue);
void mofo(const StepList& list, Queue queue);
void lion(const StepList& list, Queue queue);
void adan(const StepList& list, Queue queue);
void square_sums(const SquaresList& list, Queue queue);

// Devices there are; 0 without a driver, and through the shim.
int device_count();

}  // namespace commrt::cuda
