// Sums of squares: of a segment in fp32, in an order that sixteen lanes and a warp share; of segments
// in fp64, every thirty-second one after the other, then pairwise.
#pragma once

#include <cstring>

#include "../step.h"
#include "block.h"

namespace commrt::COMMRT_ISA {

constexpr int kSumLanes = 32;
constexpr int kSquaresAheadBytes = 4096;  // measured

// Row r of sixteen elements is added to row r + 8, then rows four, two and one apart, then the lanes.
template <DType dtype>
COMMRT_INLINE float segment_squares(const std::uint8_t* from) {
  constexpr int kRows = kSegment / kLanes;
  constexpr std::int64_t row_bytes = kLanes * element_size(dtype);
  Vf sum[kRows / 2];
  for (int row = 0; row < kRows / 2; ++row) {
    const Vf x = load<dtype>(from + row * row_bytes);
    const Vf y = load<dtype>(from + (row + kRows / 2) * row_bytes);
    sum[row] = add(mul(x, x), mul(y, y));
  }
  for (int width = kRows / 4; width > 0; width /= 2) {
    for (int row = 0; row < width; ++row) sum[row] = add(sum[row], sum[row + width]);
  }
  return sum_lanes(sum[0]);
}

// Of whole rows.
template <DType dtype>
COMMRT_INLINE double row_squares(const std::uint8_t* from, std::int64_t rows, std::int64_t cols) {
  constexpr std::int64_t size = element_size(dtype);
  double lane[kSumLanes] = {};
  unsigned next = 0;
  for (std::int64_t r = 0; r < rows; ++r, from += cols * size) {
    std::int64_t col = 0;
    for (; col + kSegment <= cols; col += kSegment) {
      for (std::int64_t byte = 0; byte < kSegment * size; byte += 64) {
        prefetch(from + col * size + byte + kSquaresAheadBytes);
      }
      lane[next++ % kSumLanes] += static_cast<double>(segment_squares<dtype>(from + col * size));
    }
    if (col == cols) continue;
    std::uint8_t last[kSegment * size] = {};
    std::memcpy(last, from + col * size, static_cast<std::size_t>((cols - col) * size));
    lane[next++ % kSumLanes] += static_cast<double>(segment_squares<dtype>(last));
  }
  const int used = next < kSumLanes ? static_cast<int>(next) : kSumLanes;
  for (int width = kSumLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i + width < used && i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

}  // namespace commrt::COMMRT_ISA
