#include "dispatch.h"

#include <atomic>

namespace commrt {

#define COMMRT_DECLARE_KERNELS(isa)                                                       \
  namespace isa {                                                                         \
  void block_encode(const BlockEncodeArgs&, std::int64_t, std::int64_t);                  \
  void block_decode(const BlockDecodeArgs&, std::int64_t, std::int64_t);                  \
  void loco_encode(const LocoEncodeArgs&, std::int64_t, std::int64_t);                    \
  void decode_average(const DecodeAverageArgs&, std::int64_t, std::int64_t);              \
  void decode_average_encode(const DecodeAverageEncodeArgs&, std::int64_t, std::int64_t); \
  void rescale(const RescaleArgs&, std::int64_t, std::int64_t);                           \
  void adam_mini(const StepList&, std::int64_t, std::int64_t);                            \
  void adamw(const StepList&, std::int64_t, std::int64_t);                                \
  void mofo(const StepList&, std::int64_t, std::int64_t);                                 \
  void lion(const StepList&, std::int64_t, std::int64_t);                                 \
  void adan(const StepList&, std::int64_t, std::int64_t);                                 \
  void square_sums(const SquaresList&, std::int64_t, std::int64_t);                       \
  void copy_stream(const float*, float*, std::int64_t);                                   \
  float read(const float*, std::int64_t);                                                 \
  bool patch_apply(const PatchApplyArgs&, std::int64_t, std::int64_t);                    \
  void patch_encode(const PatchEncodeArgs&, PatchPiece&, std::int64_t, std::int64_t);     \
  void dither_quantise(const DitherQuantiseArgs&, std::int64_t, std::int64_t);            \
  void dither_dequantise(const DitherDequantiseArgs&, std::int64_t, std::int64_t);        \
  void scale_rows(const ScaleRowsArgs&, std::int64_t, std::int64_t);                      \
  void lmmse_combine(const LmmseCombineArgs&, std::int64_t, std::int64_t);                \
  void rans_encode(const RansEncodeArgs&, std::int64_t, std::int64_t);                    \
  void rans_decode(const RansDecodeArgs&, std::int64_t, std::int64_t);                    \
  void polar_transform(const PolarTransformArgs&, std::int64_t, std::int64_t);            \
  void polar_decode(const PolarDecodeArgs&, std::int64_t, std::int64_t);                  \
  void coset_llr(const CosetLlrArgs&, std::int64_t, std::int64_t);                        \
  void coset_decode(const CosetDecodeArgs&, std::int64_t, std::int64_t);                  \
  const Kernels kernels = {#isa,                                                          \
                           block_encode,                                                  \
                           block_decode,                                                  \
                           loco_encode,                                                   \
                           decode_average,                                                \
                           decode_average_encode,                                         \
                           rescale,                                                       \
                           adam_mini,                                                     \
                           adamw,                                                         \
                           mofo,                                                          \
                           lion,                                                          \
                           adan,                                                          \
                           square_sums,                                                   \
                           copy_stream,                                                   \
                           read,                                                          \
                           patch_apply,                                                   \
                           patch_encode,                                                  \
                           dither_quantise,                                               \
                           dither_dequantise,                                             \
                           scale_rows,                                                    \
                           lmmse_combine,                                                 \
                           rans_encode,                                                   \
                           rans_decode,                                                   \
                           polar_transform,                                               \
                           polar_decode,                                                  \
                           coset_llr,                                                     \
                           coset_decode};                                                 \
  }

COMMRT_DECLARE_KERNELS(portable)
#if defined(COMMRT_X86_64)
COMMRT_DECLARE_KERNELS(avx2)
COMMRT_DECLARE_KERNELS(avx512)
#endif

namespace {

std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found = {&portable::kernels};
#if defined(COMMRT_X86_64)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  if (has_avx2) found.push_back(&avx2::kernels);
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    found.push_back(&avx512::kernels);
  }
#endif
  return found;
}

std::atomic<const Kernels*>& active() {
  static std::atomic<const Kernels*> kernels{runnable().back()};
  return kernels;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : runnable()) names.emplace_back(kernels->isa);
  return names;
}

const Kernels& active_kernels() { return *active().load(std::memory_order_relaxed); }

bool select_isa(const std::string& name) {
  for (const Kernels* kernels : runnable()) {
    if (name == kernels->isa) {
      active().store(kernels, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace commrt
