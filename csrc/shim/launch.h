// kernel<<<grid, threads, shared_bytes>>>(arguments): block after block, in order, before it returns.
// COMMRT_SHIM_SEED, if set and not 0, shuffles the blocks and, from turn to turn, the threads.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <numeric>

#include "thread_block.h"

namespace commrt::shim {

inline unsigned seed_from_environment() {
  const char* text = std::getenv("COMMRT_SHIM_SEED");
  return text == nullptr ? 0u : static_cast<unsigned>(std::atoi(text));
}

inline std::vector<unsigned> block_order(unsigned count, unsigned seed) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (seed) std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  return order;
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 threads, std::size_t shared_bytes,
            Arguments... arguments) {
  const std::size_t count = std::size_t{threads.x} * threads.y * threads.z;
  if (count == 0 || count > kMostThreads || grid.x == 0 || grid.y != 1 || grid.z != 1 ||
      shared_bytes > kMostSharedBytes) {
    throw Error("invalid configuration of a launch");
  }
  const unsigned seed = seed_from_environment();
  static thread_local ThreadBlock block;
  auto body = [&] { kernel(static_cast<Parameters>(arguments)...); };
  block.begin(seed);
  for (const unsigned index : block_order(grid.x, seed)) {
    block.run({index, 0, 0}, grid, threads, shared_bytes, body);
  }
  block.end();
}

}  // namespace commrt::shim
