// The shim by itself: what it offers gives what CUDA gives, and what is undefined there is named.
//
//   shim_check          every check
//   shim_check right    without kernels that are wrong: a launch that ends in an error orders nothing, so
//                       ThreadSanitizer would report whatever follows
//   shim_check race     a kernel without its barrier, which it has to report
#include <cstdio>
#include <string>
#include <vector>

#include "../shim/cuda.h"

namespace {

using commrt::shim::current_block;
using commrt::shim::launch;

constexpr unsigned kThreads = 64, kBlocks = 3;

int failures = 0;

void expect(const char* what, bool is_so) {
  std::printf("%s: %s\n", what, is_so ? "ok" : "FAILED");
  failures += !is_so;
}

// Each block reverses its part of the numbers, through shared memory.
__global__ void reverse(const float* from, float* to, bool has_barrier) {
  auto* shared = static_cast<float*>(current_block->shared());
  const unsigned first = blockIdx.x * blockDim.x;
  shared[threadIdx.x] = from[first + threadIdx.x];
  if (has_barrier) __syncthreads();
  to[first + threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

bool reverses(bool has_barrier) {
  std::vector<float> from(kThreads * kBlocks), to(from.size());
  for (unsigned i = 0; i < from.size(); ++i) from[i] = static_cast<float>(i);
  launch(reverse, kBlocks, kThreads, kThreads * sizeof(float), from.data(), to.data(), has_barrier);
  bool is_right = true;
  for (unsigned i = 0; i < from.size(); ++i) {
    const unsigned block = i / kThreads;
    is_right &= to[i] == from[(2 * block + 1) * kThreads - 1 - i];
  }
  return is_right;
}

struct Warp {
  int broadcast, exchanged, beyond, votes;
};

__global__ void talk(Warp* lanes) {
  const int lane = static_cast<int>(threadIdx.x);
  Warp& own = lanes[lane];
  own.broadcast = __shfl_sync(0xffffffffu, lane, 3, 16);
  own.exchanged = __shfl_xor_sync(0xffffffffu, lane, 5);
  own.beyond = __shfl_xor_sync(0xffffffffu, lane, 16, 16);
  own.votes = __popc(__ballot_sync(0xffffffffu, lane % 3 == 0));
  if (lane < 8) own.votes += 100 * __popc(__ballot_sync(0xffu, 1));
}

bool warps_talk() {
  std::vector<Warp> lanes(warpSize);
  launch(talk, 1, warpSize, 0, lanes.data());
  bool is_right = true;
  for (int lane = 0; lane < warpSize; ++lane) {
    const Warp& own = lanes[static_cast<std::size_t>(lane)];
    is_right &= own.broadcast == lane / 16 * 16 + 3;
    is_right &= own.exchanged == (lane ^ 5);
    is_right &= own.beyond == (lane < 16 ? lane : lane - 16);
    is_right &= own.votes == 11 + (lane < 8 ? 800 : 0);
  }
  return is_right;
}

// -- what is wrong on a GPU -----------------------------------------------------------------------

__global__ void some_leave() {
  if (threadIdx.x < 40) return;
  __syncthreads();
}
__global__ void some_wait_elsewhere() {
  if (threadIdx.x < 32) return __syncthreads();
  __syncwarp(threadIdx.x < 48 ? 0xffffffffu : 0xffff0000u);
}
__global__ void a_lane_is_not_named() { __syncwarp(0xfffffffeu); }
__global__ void lanes_meet_elsewhere() {
  if (threadIdx.x % 2) {
    __syncwarp();
  } else {
    __ballot_sync(0xffffffffu, 1);
  }
}
__global__ void a_source_is_not_named() {
  if (threadIdx.x < 16) __shfl_sync(0xffffu, 1, 20);
}
__global__ void misaligned(char* memory) { __stcs(reinterpret_cast<uint4*>(memory + 4), uint4{}); }
__global__ void nothing() {}

template <typename Launch>
void expect_error(const char* text, Launch run) {
  std::string found = "no error";
  try {
    run();
  } catch (const commrt::shim::Error& error) {
    found = error.what();
  }
  expect(text, found.find(text) != std::string::npos);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "race") {
    reverses(false);
    return 0;
  }
  expect("barrier of a block", reverses(true));
  expect("collectives of a warp", warps_talk());
  expect("rounding", __fadd_rn(__fmul_rn(0.1f, 0.1f), -0.01f) != __fmaf_rn(0.1f, 0.1f, -0.01f) &&
                         __fdiv_rn(1.0f, 3.0f) == 1.0f / 3.0f);
  if (mode == "right") return failures ? 1 : 0;
  expect_error("after some threads of the block have ended",
               [] { launch(some_leave, 1, kThreads, 0); });
  expect_error("threads wait for each other", [] { launch(some_wait_elsewhere, 1, kThreads, 0); });
  expect_error("does not name the lane that calls",
               [] { launch(a_lane_is_not_named, 1, kThreads, 0); });
  expect_error("lanes of a warp meet at", [] { launch(lanes_meet_elsewhere, 1, kThreads, 0); });
  expect_error("wants the value of a lane", [] { launch(a_source_is_not_named, 1, kThreads, 0); });
  alignas(16) static char memory[64];
  expect_error("misaligned address of a 16-byte access",
               [] { launch(misaligned, 1, 1, 0, memory); });
  expect_error("invalid configuration", [] { launch(nothing, 1, 1025, 0); });
  expect_error("invalid configuration", [] { launch(nothing, 1, 1, 48 * 1024 + 1); });
  return failures ? 1 : 0;
}
