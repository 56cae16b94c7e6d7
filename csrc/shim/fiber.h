// A stack of its own on which a function runs until it suspends: one fiber is one CUDA thread.
//
// On x86-64 a switch is fifteen instructions, elsewhere (or with -DCOMMRT_SHIM_UCONTEXT) that of
// <ucontext.h>, which also saves the signal mask by a system call. The sanitizers are told of every
// switch. To ThreadSanitizer fibers are threads that nothing orders: what does, a barrier say, has to be
// declared by release() and acquire().
#pragma once

#include <cstddef>

#if defined(__x86_64__) && !defined(COMMRT_SHIM_UCONTEXT)
#define COMMRT_SHIM_ASSEMBLY
#else
#include <ucontext.h>
#endif

namespace commrt::shim {

// For the scheduler's own data, which fibers share without any barrier.
#define COMMRT_SHIM_NO_TSAN __attribute__((no_sanitize("thread")))

class Fiber {
 public:
  using Entry = void (*)();

  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  // Make the next resume() call `entry`, which must not return but end by finish().
  void prepare(char* stack, std::size_t stack_bytes, Entry entry);

  // Run this fiber until it suspends or finishes. Called by the scheduler only.
  void resume();

  // Back to the scheduler. Called on this fiber only.
  void suspend() { leave(false); }
  [[noreturn]] void finish();

 private:
  static void begin();
  void leave(bool for_ever);

#if defined(COMMRT_SHIM_ASSEMBLY)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  char* stack_ = nullptr;
  std::size_t stack_bytes_ = 0;
  Entry entry_ = nullptr;
  void *tsan_ = nullptr, *tsan_before_ = nullptr;
  void* asan_ = nullptr;
};

// What was written before release(object), by any fiber or the scheduler, is ordered before what is
// read after acquire(object).
void release(void* object);
void acquire(void* object);

}  // namespace commrt::shim
