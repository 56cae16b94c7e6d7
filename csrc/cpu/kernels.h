// The ops for one instruction set; each works on blocks [begin, end).
#pragma once

#include "../ops.h"

namespace commrt {

struct Kernels {
  const char* isa;
  void (*block_encode)(const BlockEncodeArgs&, std::int64_t begin, std::int64_t end);
  void (*block_decode)(const BlockDecodeArgs&, std::int64_t begin, std::int64_t end);
  void (*loco_encode)(const LocoEncodeArgs&, std::int64_t begin, std::int64_t end);
  void (*decode_average)(const DecodeAverageArgs&, std::int64_t begin, std::int64_t end);
  void (*decode_average_encode)(const DecodeAverageEncodeArgs&, std::int64_t begin,
                                std::int64_t end);
  void (*rescale)(const RescaleArgs&, std::int64_t begin, std::int64_t end);
  void (*copy_stream)(const float* from, float* to, std::int64_t numel);
  float (*read)(const float* from, std::int64_t numel);
};

}  // namespace commrt
