#include "fiber.h"

#include <cstdint>
#include <cstdlib>
#include <utility>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace commrt::shim {
namespace {

// The scheduler of this operating system's thread, while one of its fibers runs.
struct Scheduler {
#if defined(COMMRT_SHIM_ASSEMBLY)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  const void* stack = nullptr;
  std::size_t stack_bytes = 0;
  void* tsan = nullptr;
  void* asan = nullptr;
};

thread_local Scheduler scheduler;
thread_local Fiber* running = nullptr;

}  // namespace

#if defined(COMMRT_SHIM_ASSEMBLY)
// Push the registers that a called function has to keep, exchange stacks, pop them.
extern "C" void commrt_shim_switch(void** from, void* to);
asm(R"(
.text
.local commrt_shim_switch
.type commrt_shim_switch,@function
commrt_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size commrt_shim_switch, .-commrt_shim_switch
)");
#endif

Fiber::~Fiber() {
#if defined(__SANITIZE_THREAD__)
  for (void* fiber : {tsan_, tsan_before_}) {
    if (fiber != nullptr) __tsan_destroy_fiber(fiber);
  }
#endif
}

void Fiber::prepare(char* stack, std::size_t stack_bytes, Entry entry) {
  stack_ = stack;
  stack_bytes_ = stack_bytes;
  entry_ = entry;
#if defined(COMMRT_SHIM_ASSEMBLY)
  constexpr int kSavedRegisters = 6;
  auto** top = reinterpret_cast<void**>(stack + stack_bytes);
  *--top = nullptr;  // where a caller's address would be, so that the stack is aligned
  *--top = reinterpret_cast<void*>(&Fiber::begin);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  stack_pointer_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = stack_bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::begin, 0);
#endif
#if defined(__SANITIZE_THREAD__)
  // Another one than last time: what the fiber did then is not ordered before what it does now.
  std::swap(tsan_, tsan_before_);
  if (tsan_ == nullptr) tsan_ = __tsan_create_fiber(0);
#endif
}

COMMRT_SHIM_NO_TSAN void Fiber::resume() {
  running = this;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler.asan, stack_, stack_bytes_);
#endif
#if defined(__SANITIZE_THREAD__)
  scheduler.tsan = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(COMMRT_SHIM_ASSEMBLY)
  commrt_shim_switch(&scheduler.stack_pointer, stack_pointer_);
#else
  swapcontext(&scheduler.context, &context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler.asan, nullptr, nullptr);
#endif
}

COMMRT_SHIM_NO_TSAN void Fiber::leave(bool for_ever) {
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(scheduler.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &asan_, scheduler.stack,
                                 scheduler.stack_bytes);
#endif
  (void)for_ever;
#if defined(COMMRT_SHIM_ASSEMBLY)
  commrt_shim_switch(&stack_pointer_, scheduler.stack_pointer);
#else
  swapcontext(&context_, &scheduler.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(asan_, &scheduler.stack, &scheduler.stack_bytes);
#endif
}

COMMRT_SHIM_NO_TSAN void Fiber::begin() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_bytes);
#endif
  running->entry_();
  std::abort();
}

void Fiber::finish() {
  leave(true);
  std::abort();
}

void release([[maybe_unused]] void* object) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(object);
#endif
}

void acquire([[maybe_unused]] void* object) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(object);
#endif
}

}  // namespace commrt::shim
