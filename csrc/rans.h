// What the ops of rANS take, on every device; commrt/ops/rans.py has the layout.
// Each op has the same name in commrt/ops/reference, which is its specification.
#pragma once

#include "math/rans.h"
#include "ops.h"

namespace commrt {

// Lower bounds of the symbols' slots, kSymbols a row.
struct RansTable {
  const std::uint16_t* starts;
  std::int64_t num_rows;  // at least one
};

// Streams lie `capacity` words apart, one for each segment.
struct RansEncodeArgs {
  const std::int16_t* codes;
  const std::int16_t* rows;
  std::int64_t numel;
  RansTable table;
  int lanes;
  const std::uint16_t* checks;
  std::uint16_t* words;
  std::int64_t capacity;
  std::int32_t* lengths;
  std::int16_t* escaped;  // may be null, then none may
  std::int32_t* num_escaped;
};

struct RansDecodeArgs {
  const std::uint16_t* words;
  std::int64_t capacity;
  const std::int32_t* lengths;
  const std::int16_t* rows;
  std::int64_t numel;
  RansTable table;
  int lanes;
  std::int16_t* codes;
  std::uint16_t* checks;
  std::int32_t* used;
};

// Parts of the codes, each with counts of its own.
struct RansCountArgs {
  const std::int16_t* codes;
  const std::int16_t* rows;
  const std::int64_t* ends;
  std::int64_t num_rows;
  std::int64_t* counts;
};

COMMRT_HD std::int64_t rans_segments(std::int64_t numel) {
  return (numel + kRansSegment - 1) / kRansSegment;
}
// Symbols that a segment has.
COMMRT_HD int rans_symbols(std::int64_t numel, std::int64_t segment) {
  const std::int64_t left = numel - segment * kRansSegment;
  return static_cast<int>(left < kRansSegment ? left : kRansSegment);
}

// Call body.template operator()<lanes>() for the run-time number of lanes.
template <typename Body>
COMMRT_HOST void with_lanes(int lanes, Body body) {
  switch (lanes) {
    case 1: return body.template operator()<1>();
    case 4: return body.template operator()<4>();
    default: return body.template operator()<32>();
  }
}

}  // namespace commrt
