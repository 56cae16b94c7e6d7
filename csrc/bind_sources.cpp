// The ops on sources: addresses and sizes in, nothing out.
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "bind.h"
#include "cpu/dispatch.h"
#include "cpu/thread_pool.h"

namespace nb = nanobind;

namespace commrt {
namespace {

struct SourceArg : Source {
  SourceArg(Address values, int dtype)
      : Source{at<const void>(values), static_cast<DType>(dtype)} {}
};

template <typename Args>
void spread_tiles(void (*kernel)(const Args&, Index, Index), const Args& args,
                  ThreadCount threads) {
  const Index tiles = (args.numel + kSourceTile - 1) / kSourceTile;
  parallel_for(tiles, kGrainElements / kSourceTile, threads.count,
               [&](Index begin, Index end) { kernel(args, begin, end); });
}

// So many of `units` that they have kGrainElements elements, on average.
Index grain_of(Index units, Index numel) {
  return std::max<Index>(1, units * kGrainElements / std::max<Index>(1, numel));
}

std::vector<Matrix> matrices_of(const std::vector<Index>& shapes) {
  std::vector<Matrix> matrices;
  Index begin = 0;
  for (std::size_t i = 0; i + 1 < shapes.size(); i += 2) {
    matrices.push_back({begin, shapes[i], shapes[i + 1]});
    begin += shapes[i] * shapes[i + 1];
  }
  return matrices;
}

void source_energies(Address energies, SourceArg previous, SourceArg own, float previous_weight,
                     const std::vector<Index>& shapes, ThreadCount threads) {
  const nb::gil_scoped_release release;
  const std::vector<Matrix> matrices = matrices_of(shapes);
  const SourceEnergiesArgs args{previous, own, previous_weight, matrices.data(),
                                at<float>(energies)};
  Index rows = 0, cols = 0, numel = 0;
  for (const Matrix& matrix : matrices) {
    rows = std::max(rows, matrix.rows);
    cols = std::max(cols, matrix.cols);
    numel += matrix.rows * matrix.cols;
  }
  const auto count = static_cast<Index>(matrices.size());
  parallel_for(count, grain_of(count, numel), threads.count, [&](Index begin, Index end) {
    std::vector<std::int64_t> of_row(static_cast<std::size_t>(rows));
    std::vector<std::int64_t> of_col(static_cast<std::size_t>(cols));
    std::vector<float> col(static_cast<std::size_t>(cols));
    active_kernels().source_energies(args, {of_row.data(), of_col.data(), col.data()}, begin, end);
  });
}

void source_prediction(Address predicted, Index numel, SourceArg previous, SourceArg own,
                       const std::vector<float>& weights, GroupsArg groups, ThreadCount threads) {
  const nb::gil_scoped_release release;
  spread_tiles(
      active_kernels().source_prediction,
      SourcePredictionArgs{previous, own, weights.data(), groups, at<float>(predicted), numel},
      threads);
}

void source_products(Address products, Address update, Index numel, SourceArg previous,
                     SourceArg own, GroupsArg groups, ThreadCount threads) {
  const nb::gil_scoped_release release;
  const SourceProductsArgs args{at<const float>(update), previous, own, groups,
                                at<double>(products),    numel};
  parallel_for(groups.count, grain_of(groups.count, numel), threads.count,
               [&](Index begin, Index end) { active_kernels().source_products(args, begin, end); });
}

void source_history(Address kept, Address decoded, Address predicted, Address rows, Index numel,
                    Address shares, int num_shares, ThreadCount threads) {
  const nb::gil_scoped_release release;
  spread_tiles(active_kernels().source_history,
               SourceHistoryArgs{at<const float>(decoded), at<const float>(predicted),
                                 at<const std::int16_t>(rows), at<const float>(shares), num_shares,
                                 at<std::uint16_t>(kept), numel},
               threads);
}

}  // namespace

void bind_sources(nb::module_& m) {
  nb::class_<SourceArg>(m, "Source").def(nb::init<Address, int>());
  nb::class_<GroupsArg>(m, "Groups").def(nb::init<Address, int>());
  m.def("source_energies", &source_energies);
  m.def("source_prediction", &source_prediction);
  m.def("source_products", &source_products);
  m.def("source_history", &source_history);
}

}  // namespace commrt
