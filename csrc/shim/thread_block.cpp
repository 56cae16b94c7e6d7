#include "thread_block.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>

namespace commrt::shim {
namespace {

constexpr std::size_t kStackBytes = 64 << 10;
constexpr int kNonsense = 0xC5;
constexpr std::size_t kMostNamed = 8;  // threads in a deadlock's message

char* map_stacks() {
  void* memory = mmap(nullptr, kStackBytes * kMostThreads, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw Error("no memory for the threads' stacks");
  return static_cast<char*>(memory);
}

}  // namespace

thread_local ThreadBlock* current_block = nullptr;

void ThreadBlock::Unmap::operator()(char* stacks) const {
  munmap(stacks, kStackBytes * kMostThreads);
}

void ThreadBlock::Free::operator()(void* memory) const { std::free(memory); }

ThreadBlock::ThreadBlock() : stacks_(map_stacks()), threads_of_block_(new Thread[kMostThreads]) {}

void ThreadBlock::begin(unsigned seed) {
  is_shuffled_ = seed != 0;
  random_.seed(seed);
  shared_.clear();
}

void ThreadBlock::end() {
  for (unsigned i = 0; i < count_; ++i) acquire(&threads_of_block_[i].order);
  shared_.clear();
}

COMMRT_SHIM_NO_TSAN void ThreadBlock::run(uint3 block, dim3 grid, dim3 threads,
                                          std::size_t shared_bytes) {
  block_ = block;
  grid_ = grid;
  threads_ = threads;
  count_ = threads.x * threads.y * threads.z;
  allocate_shared(shared_bytes);
  prepare();
  release(&start_);
  current_block = this;
  while (ended_ < count_) {
    bool has_run = run_ready_threads();
    if (!error_.empty()) throw Error(error_);
    if (at_barrier_ && at_barrier_ + ended_ == count_) {
      if (ended_) throw Error("__syncthreads() after some threads of the block have ended");
      open_barrier();
      has_run = true;
    }
    if (!has_run) report_deadlock();
  }
}

// Of the exact size, so that AddressSanitizer sees its end. Memory of another block is other memory:
// at the same address ThreadSanitizer would take the blocks for racing.
COMMRT_SHIM_NO_TSAN void ThreadBlock::allocate_shared(std::size_t num_bytes) {
#if !defined(__SANITIZE_THREAD__)
  shared_.clear();
#endif
  shared_of_block_ = std::malloc(num_bytes);
  shared_.emplace_back(shared_of_block_);
  auto* bytes = static_cast<volatile unsigned char*>(shared_of_block_);
  for (std::size_t i = 0; i < num_bytes; ++i) bytes[i] = kNonsense;  // memset() would be recorded
}

COMMRT_SHIM_NO_TSAN void ThreadBlock::prepare() {
  ended_ = at_barrier_ = 0;
  error_.clear();
  for (unsigned i = 0; i < count_; ++i) {
    Thread& thread = threads_of_block_[i];
    thread.state = State::kReady;
    thread.block_barriers = thread.warp_barriers = 0;
    thread.lane = static_cast<int>(i % kWarpSize);
    thread.first_of_warp = i - i % kWarpSize;
    thread.index = {i % threads_.x, i / threads_.x % threads_.y, i / (threads_.x * threads_.y)};
    thread.fiber.prepare(stacks_.get() + i * kStackBytes, kStackBytes, &ThreadBlock::thread_main);
  }
  order_.resize(count_);
  std::iota(order_.begin(), order_.end(), 0u);
}

COMMRT_SHIM_NO_TSAN bool ThreadBlock::run_ready_threads() {
  if (is_shuffled_) std::shuffle(order_.begin(), order_.end(), random_);
  bool has_run = false;
  for (const unsigned i : order_) {
    if (threads_of_block_[i].state != State::kReady) continue;
    running_ = i;
    threads_of_block_[i].fiber.resume();
    has_run = true;
    if (!error_.empty()) break;
  }
  return has_run;
}

COMMRT_SHIM_NO_TSAN void ThreadBlock::thread_main() {
  ThreadBlock& block = *current_block;
  acquire(&block.start_);
  try {
    block.call_(block.target_);
  } catch (const std::exception& error) {
    block.error_ = error.what();
  }
  Thread& thread = block.thread();
  release(&thread.order);
  thread.state = State::kEnded;
  ++block.ended_;
  thread.fiber.finish();
}

COMMRT_SHIM_NO_TSAN void ThreadBlock::sync_threads() {
  Thread& self = thread();
  self.state = State::kAtBarrier;
  ++at_barrier_;
  char* order = &barriers_[self.block_barriers++ % 2];
  release(order);
  self.fiber.suspend();
  acquire(order);
}

COMMRT_SHIM_NO_TSAN void ThreadBlock::open_barrier() {
  for (unsigned i = 0; i < count_; ++i) threads_of_block_[i].state = State::kReady;
  at_barrier_ = 0;
}

COMMRT_SHIM_NO_TSAN void ThreadBlock::sync_warp(unsigned mask) {
  Thread& self = thread();
  char* order = &warps_[self.first_of_warp / kWarpSize][self.warp_barriers++ % 2];
  release(order);
  exchange(mask, "__syncwarp", 0, self.lane);
  acquire(order);
}

// Orders nothing: on a GPU, too, only __syncwarp() makes the lanes see each other's memory.
COMMRT_SHIM_NO_TSAN Exchange ThreadBlock::exchange(unsigned mask, const char* collective,
                                                   std::uint64_t sent, int source) {
  Thread& self = thread();
  if (!(mask >> self.lane & 1)) {
    throw Error(std::string(collective) + ": the mask does not name the lane that calls");
  }
  self.mask = mask;
  self.collective = collective;
  self.exchange = {sent, source};
  self.state = State::kAtCollective;
  complete_collective(self);
  if (self.state != State::kReady) self.fiber.suspend();
  if (!(mask >> source & 1)) {
    throw Error(std::string(collective) +
                ": wants the value of a lane that the mask does not name");
  }
  return self.exchange;
}

// If all that the mask names are there, give each what it wants and let them go on.
COMMRT_SHIM_NO_TSAN void ThreadBlock::complete_collective(const Thread& arrived) {
  Thread* warp = &threads_of_block_[arrived.first_of_warp];
  const unsigned mask = arrived.mask;
  const unsigned lanes = std::min<unsigned>(kWarpSize, count_ - arrived.first_of_warp);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const Thread& other = warp[lane];
    if (lane >= lanes || other.state == State::kEnded) {
      throw Error(std::string(arrived.collective) + ": the mask names a lane that has ended");
    }
    if (other.state != State::kAtCollective || other.mask != mask) return;
    if (std::strcmp(other.collective, arrived.collective) != 0) {
      throw Error(std::string("lanes of a warp meet at ") + arrived.collective + " and " +
                  other.collective);
    }
    if (other.exchange.sent) votes |= 1u << lane;
  }
  for (unsigned lane = 0; lane < lanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Thread& other = warp[lane];
    other.exchange.received = warp[other.exchange.source].exchange.sent;
    other.exchange.votes = votes;
    other.state = State::kReady;
  }
}

void ThreadBlock::report_deadlock() const {
  std::string message = "threads wait for each other:";
  std::size_t named = 0;
  for (unsigned i = 0; i < count_ && named < kMostNamed; ++i) {
    const Thread& thread = threads_of_block_[i];
    if (thread.state == State::kEnded) continue;
    const bool is_at_barrier = thread.state == State::kAtBarrier;
    message +=
        " " + std::to_string(i) + " at " + (is_at_barrier ? "__syncthreads" : thread.collective);
    ++named;
  }
  throw Error(message);
}

}  // namespace commrt::shim
