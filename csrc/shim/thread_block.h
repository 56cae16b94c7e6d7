// The threads of one block, run in turns by one thread of the operating system.
//
// A thread runs until it comes to a barrier or a warp's collective, and goes on when all those have
// come that it waits for. What cannot be right on a GPU raises Error: threads that wait for each
// other for ever, lanes of a warp at different collectives, a mask that names a lane that has ended.
//
// Not modelled: caches and memory order between blocks, occupancy, timing.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace commrt::shim {

constexpr int kWarpSize = 32;
constexpr unsigned kMostThreads = 1024;
constexpr std::size_t kMostSharedBytes = 48 * 1024;  // more has to be asked for

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What a lane brings to a warp's collective, and what it takes away.
struct Exchange {
  std::uint64_t sent = 0;
  int source = 0;  // the lane whose value is wanted
  std::uint64_t received = 0;
  unsigned votes = 0;  // a bit for each lane of the mask that sent something but zero
};

class ThreadBlock {
 public:
  ThreadBlock();

  // Before the first block of a launch. Threads run in an order drawn from the seed; 0 is that of
  // their numbers.
  void begin(unsigned seed);

  // Run all threads of a block; shared memory is filled with nonsense first. They see what the caller
  // has written; what other blocks write they see only by chance, so that it counts as a race.
  template <typename Body>
  void run(uint3 block, dim3 grid, dim3 threads, std::size_t shared_bytes, Body& body) {
    call_ = [](void* target) { (*static_cast<Body*>(target))(); };
    target_ = &body;
    run(block, grid, threads, shared_bytes);
  }

  // After the last block: the caller sees what the threads have written.
  void end();

  // What a kernel asks for by threadIdx, blockIdx, blockDim, gridDim, and by its shared arrays.
  uint3 thread_index() const { return thread().index; }
  int lane() const { return thread().lane; }
  uint3 block_index() const { return block_; }
  dim3 block_size() const { return threads_; }
  dim3 grid_size() const { return grid_; }
  void* shared() const { return shared_of_block_; }

  // Called by a kernel's threads.
  void sync_threads();
  void sync_warp(unsigned mask);
  Exchange exchange(unsigned mask, const char* collective, std::uint64_t sent, int source);

 private:
  enum class State { kReady, kAtBarrier, kAtCollective, kEnded };

  struct Thread {
    Fiber fiber;
    State state;
    uint3 index;
    int lane;
    unsigned first_of_warp;
    unsigned mask;
    const char* collective;
    unsigned block_barriers, warp_barriers;  // that it has come to
    Exchange exchange;
    char order;  // its address orders this thread's end before what follows the launch
  };

  Thread& thread() const { return threads_of_block_[running_]; }
  void run(uint3 block, dim3 grid, dim3 threads, std::size_t shared_bytes);
  static void thread_main();
  void prepare();
  void allocate_shared(std::size_t num_bytes);
  bool run_ready_threads();
  void open_barrier();
  void complete_collective(const Thread& arrived);
  [[noreturn]] void report_deadlock() const;

  struct Unmap {
    void operator()(char* stacks) const;
  };
  struct Free {
    void operator()(void* memory) const;
  };

  std::unique_ptr<char, Unmap> stacks_;
  std::unique_ptr<Thread[]> threads_of_block_;
  std::vector<std::unique_ptr<void, Free>> shared_;  // of one block, or of all of a launch
  void* shared_of_block_ = nullptr;
  void (*call_)(void*) = nullptr;
  void* target_ = nullptr;
  uint3 block_ = {};
  dim3 threads_, grid_;
  unsigned count_ = 0, ended_ = 0, at_barrier_ = 0, running_ = 0;
  bool is_shuffled_ = false;
  std::mt19937 random_;
  std::vector<unsigned> order_;
  std::string error_;
  char start_ = 0;
  // What orders the threads at a barrier; in turns, since some may be at the next one already.
  char barriers_[2] = {}, warps_[kMostThreads / kWarpSize][2] = {};
};

// The block whose threads this thread of the operating system runs.
extern thread_local ThreadBlock* current_block;

}  // namespace commrt::shim
