#include "../math/second.h"
#include "squares.h"
#include "step.h"

namespace commrt::COMMRT_ISA {
namespace {

// With one factor for the whole run, or one for each of its columns.
template <bool by_column>
struct RunRule : AdamMiniRule {
  V factor;
  const float* factors;

  COMMRT_MEMBER void operator()(int i, V g, V& w, V (&m)[kMoments]) const {
    AdamMiniRule::operator()(g, w, m, by_column ? load<DType::kFloat32>(factors + i) : factor);
  }
};

template <DType dtype>
COMMRT_INLINE void step_row(const StepTensor& tensor, std::int64_t row,
                            const StepOptions& options) {
  const AdamMiniRule rule(options);
  for (std::int64_t col = 0; col < tensor.cols; col += kRun) {
    const int count = static_cast<int>(tensor.cols - col < kRun ? tensor.cols - col : kRun);
    const Run run = {row, col, count};
    if (tensor.second_from == Second::kOfColumn) {
      TileBuffer factors;
      for (int i = 0; i < count; ++i)
        factors.value[i] = step_factor(tensor.second[col + i], options);
      for (int i = count; i % kGroup; ++i) factors.value[i] = 0.0f;
      step_run<dtype>(tensor, run, RunRule<true>{rule, {}, factors.value});
    } else {
      const float factor = step_factor(tensor.second[row], options);
      step_run<dtype>(tensor, run, RunRule<false>{rule, broadcast(factor), nullptr});
    }
  }
}

// The second moments of a block of rows.
template <DType dtype>
COMMRT_INLINE void update_second(const StepTensor& tensor, std::int64_t first,
                                 const StepOptions& options) {
  const auto* grad = static_cast<const std::uint8_t*>(tensor.grad);
  const double squares = row_squares<dtype>(grad + first * tensor.cols * element_size(dtype),
                                            tensor.block_rows, tensor.cols);
  const float mean =
      mean_square(squares, tensor.block_rows * tensor.cols, grad_multiplier(options));
  for (std::int64_t row = first; row < first + tensor.block_rows; ++row) {
    tensor.second[row] = updated_second(tensor.second[row], mean, options.beta2);
  }
}

}  // namespace

// A unit is as many whole blocks as rows_per_unit() says.
void adam_mini(const StepList& list, std::int64_t begin, std::int64_t end) {
  for_each_tensor(list, begin, end, [&](const StepTensor& tensor, auto first, auto last) {
    const std::int64_t per_unit = rows_per_unit(tensor.cols, tensor.block_rows);
    const std::int64_t end_row = last * per_unit < tensor.rows ? last * per_unit : tensor.rows;
    with_dtype(tensor.grad_dtype, [&]<DType dtype>() {
      for (std::int64_t row = first * per_unit; row < end_row; ++row) {
        if (tensor.second_from == Second::kUpdated && row % tensor.block_rows == 0) {
          update_second<dtype>(tensor, row, list.options);
        }
        step_row<dtype>(tensor, row, list.options);
      }
    });
  });
}

}  // namespace commrt::COMMRT_ISA
