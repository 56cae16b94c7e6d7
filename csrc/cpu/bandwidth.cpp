// Yardsticks for bench/codecs.py: what this core reads, and copies past its caches.
#include "block.h"

namespace commrt::COMMRT_ISA {

void copy_stream(const float* from, float* to, std::int64_t numel) {
  COMMRT_UNROLL
  for (std::int64_t i = 0; i < numel; i += kLanes) {
    prefetch(reinterpret_cast<const std::uint8_t*>(from + i) + kPrefetchBytes);
    stream<DType::kFloat32>(to + i, load<DType::kFloat32>(from + i));
  }
  stream_fence();
}

float read(const float* from, std::int64_t numel) {
  Vf total[4] = {broadcast(0.0f), broadcast(0.0f), broadcast(0.0f), broadcast(0.0f)};
  COMMRT_UNROLL
  for (std::int64_t i = 0; i < numel; i += 4 * kLanes) {
    for (int k = 0; k < 4; ++k) {
      const float* lanes = from + i + k * kLanes;
      prefetch(reinterpret_cast<const std::uint8_t*>(lanes) + kPrefetchBytes);
      total[k] = add(total[k], load<DType::kFloat32>(lanes));
    }
  }
  return sum_lanes(add(add(total[0], total[1]), add(total[2], total[3])));
}

}  // namespace commrt::COMMRT_ISA
