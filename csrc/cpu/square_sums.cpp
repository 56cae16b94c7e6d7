#include "squares.h"
#include "step.h"

namespace commrt::COMMRT_ISA {
namespace {

template <DType dtype>
COMMRT_INLINE void sum_rows(const SquaresTensor& tensor, std::int64_t first, std::int64_t last) {
  const auto* grad = static_cast<const std::uint8_t*>(tensor.grad);
  for (std::int64_t row = first; row < last; ++row) {
    const auto* from = grad + row * tensor.cols * element_size(dtype);
    tensor.sums[row] = row_squares<dtype>(from, 1, tensor.cols);
  }
}

// One row after the other, in fp64.
template <DType dtype>
COMMRT_INLINE void sum_columns(const SquaresTensor& tensor, std::int64_t col, int count) {
  const auto* grad = static_cast<const std::uint8_t*>(tensor.grad);
  double sum[kSegment] = {};
  TileBuffer row_buffer;
  for (std::int64_t row = 0; row < tensor.rows; ++row) {
    const std::int64_t offset = row * tensor.cols + col;
    const float* x = widen_floats<dtype>(grad, offset, count, row_buffer);
    for (int i = 0; i < count; ++i) {
      const auto wide = static_cast<double>(x[i]);
      sum[i] += wide * wide;
    }
  }
  std::memcpy(tensor.sums + col, sum, sizeof(double) * static_cast<std::size_t>(count));
}

}  // namespace

// A unit is as many rows as rows_per_unit() says, or kSegment columns.
void square_sums(const SquaresList& list, std::int64_t begin, std::int64_t end) {
  for_each_tensor(list, begin, end, [&](const SquaresTensor& tensor, auto first, auto last) {
    with_dtype(tensor.grad_dtype, [&]<DType dtype>() {
      if (!tensor.by_column) {
        const std::int64_t per_unit = rows_per_unit(tensor.cols, 1);
        const std::int64_t end_row = last * per_unit < tensor.rows ? last * per_unit : tensor.rows;
        return sum_rows<dtype>(tensor, first * per_unit, end_row);
      }
      for (std::int64_t unit = first; unit < last; ++unit) {
        const std::int64_t col = unit * kSegment, left = tensor.cols - col;
        sum_columns<dtype>(tensor, col, static_cast<int>(left < kSegment ? left : kSegment));
      }
    });
  });
}

}  // namespace commrt::COMMRT_ISA
