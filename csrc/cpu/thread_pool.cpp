#include "thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace commrt {
namespace {

using Task = std::function<void(std::int64_t, std::int64_t)>;

// IEEE rounding with subnormals, whatever the calling thread had set (torch.set_flush_denormal).
#if defined(__SSE__)
class IeeeFloats {
 public:
  IeeeFloats() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~IeeeFloats() { _mm_setcsr(saved_); }
  IeeeFloats(const IeeeFloats&) = delete;
  IeeeFloats& operator=(const IeeeFloats&) = delete;

 private:
  unsigned saved_;
};
#else
struct IeeeFloats {
  IeeeFloats() {}
};
#endif

struct Job {
  const Task* task;
  std::int64_t count;
  std::int64_t grain;
  std::atomic<std::int64_t> next{0};

  void run() {
    const IeeeFloats floats;
    for (;;) {
      const std::int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= count) return;
      (*task)(begin, std::min(begin + grain, count));
    }
  }
};

class Pool {
 public:
  void run(Job& job, int helpers) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(num_workers_) < helpers) {
        std::thread([this, index = num_workers_] { work(index); }).detach();
        ++num_workers_;
      }
      job_ = &job;
      helpers_ = helpers;
      running_ = helpers;
      ++generation_;
    }
    wake_.notify_all();
    job.run();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
    job_ = nullptr;
  }

  std::mutex busy;

 private:
  void work(int index) {
    std::uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen && job_ != nullptr; });
      seen = generation_;
      if (index >= helpers_) continue;
      Job* job = job_;
      lock.unlock();
      job->run();
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  Job* job_ = nullptr;
  int num_workers_ = 0;
  int helpers_ = 0;
  int running_ = 0;
  std::uint64_t generation_ = 0;
};

std::atomic<Pool*> current_pool{nullptr};

// The workers do not exist in a forked child: it starts a pool of its own and leaks the parent's,
// whose locks may be held for ever.
void forget_pool() { current_pool.store(nullptr); }

Pool& pool() {
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, forget_pool); });
  Pool* found = current_pool.load();
  if (found == nullptr) {
    Pool* fresh = new Pool;  // never freed: detached workers wait on it until the process ends
    if (current_pool.compare_exchange_strong(found, fresh)) return *fresh;
    delete fresh;
  }
  return *found;
}

}  // namespace

void parallel_for(std::int64_t count, std::int64_t grain, int num_threads, const Task& task) {
  if (count <= 0) return;
  Job job{&task, count, std::max<std::int64_t>(grain, 1)};
  const std::int64_t pieces = (count + job.grain - 1) / job.grain;
  const int helpers = static_cast<int>(std::min<std::int64_t>(num_threads, pieces)) - 1;
  if (helpers > 0) {
    Pool& workers = pool();
    std::unique_lock<std::mutex> lock(workers.busy, std::try_to_lock);
    if (lock.owns_lock()) {
      workers.run(job, helpers);
      return;
    }
  }
  job.run();
}

}  // namespace commrt
