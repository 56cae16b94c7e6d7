// A small persistent pool. torch brings its own OpenMP run-time; a second one would fight it.
#pragma once

#include <cstdint>
#include <functional>

namespace commrt {

// Run task(begin, end) over [0, count) in pieces of `grain` on up to `num_threads` threads, the
// caller among them. Pieces are handed out one by one, so results must not depend on who runs them.
// A call made while another one runs is done by its caller alone. Safe after fork().
void parallel_for(std::int64_t count, std::int64_t grain, int num_threads,
                  const std::function<void(std::int64_t, std::int64_t)>& task);

}  // namespace commrt
