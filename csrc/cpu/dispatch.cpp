#include "dispatch.h"

#include <atomic>

namespace commrt {

#define COMMRT_DECLARE(returns, name, ...) returns name(__VA_ARGS__, std::int64_t, std::int64_t);
#define COMMRT_POINTER(returns, name, ...) .name = name,
#define COMMRT_DECLARE_KERNELS(isa_name)                                                           \
  namespace isa_name {                                                                             \
  void copy_stream(const float*, float*, std::int64_t);                                            \
  float read(const float*, std::int64_t);                                                          \
  COMMRT_KERNELS(COMMRT_DECLARE)                                                                   \
  const Kernels kernels = {                                                                        \
      .isa = #isa_name, .copy_stream = copy_stream, .read = read, COMMRT_KERNELS(COMMRT_POINTER)}; \
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
