// From the host's arguments to a kernel on a queue.
#pragma once

#include "ops.h"
#include "tile.cuh"

namespace commrt::cuda {

// Call body.template operator()<rows>() for the rows that a warp's block takes.
template <typename Body>
COMMRT_HOST void with_rows(int block, Body body) {
  switch (rows_of(block)) {
    case 1: return body.template operator()<1>();
    case 2: return body.template operator()<2>();
    default: return body.template operator()<4>();
  }
}

// A window without what follows its blocks.
inline Window cut(Window window, std::int64_t num_blocks, int block) {
  const std::int64_t limit = num_blocks * block;
  window.numel = window.numel < limit ? window.numel : limit;
  return window;
}

// A warp for each tile of 256 elements a row; the shared memory is where means are summed.
template <int rows, typename Args>
void launch_tiles(void (*kernel)(Args, std::int64_t), const Args& args, std::int64_t num_blocks,
                  const BlockFormat& format, Queue queue) {
  if (num_blocks == 0) return;
  constexpr int kTile = kRow * rows;
  const std::int64_t tiles = (num_blocks * format.block + kTile - 1) / kTile;
  const std::size_t staging = format.mean_levels ? sizeof(float) * kWarps * kTile : 0;
  launch(kernel, static_cast<unsigned>((tiles + kWarps - 1) / kWarps), kThreads, staging, queue,
         args, num_blocks);
}

}  // namespace commrt::cuda
