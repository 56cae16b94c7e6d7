// The ops on several updates: the kernels of other ops, one after the other, update by update.
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "bind.h"
#include "cpu/dispatch.h"
#include "cpu/thread_pool.h"

namespace nb = nanobind;

namespace commrt {
namespace {

using Addresses = std::vector<Address>;

// K updates of N elements; `width` of them with what fills the last point of the lattice.
struct Shape {
  Index count, numel, width;
};

struct ShapeArg : Shape {
  ShapeArg(Index count, Index numel, Index width) : Shape{count, numel, width} {}
};

// What predictions are made from: one vector for all updates, and one or none for each.
struct SourcesArg {
  Source previous;
  std::vector<Source> own;

  SourcesArg(Address values, int dtype, const Addresses& own_values,
             const std::vector<int>& own_dtypes)
      : previous{at<const void>(values), static_cast<DType>(dtype)} {
    for (std::size_t i = 0; i < own_values.size(); ++i) {
      own.push_back({at<const void>(own_values[i]), static_cast<DType>(own_dtypes[i])});
    }
  }
  const Source& own_of(Index update) const { return own[static_cast<std::size_t>(update)]; }
};

// How each update is quantised.
struct LatticeArg {
  Lattice lattice;
  std::vector<float> steps;
  std::vector<std::uint64_t> seeds;

  LatticeArg(int which, std::vector<float> step_of, std::vector<std::uint64_t> seed_of)
      : lattice(static_cast<Lattice>(which)),
        steps(std::move(step_of)),
        seeds(std::move(seed_of)) {}
  float step(Index update) const { return steps[static_cast<std::size_t>(update)]; }
  Dither dither(Index update) const {
    return {lattice, seeds[static_cast<std::size_t>(update)], 0};
  }
};

// Small updates are shared out to threads, large ones done by all of them: `body(update, threads)`.
template <typename Body>
void for_each_update(const Shape& shape, ThreadCount threads, Body body) {
  if (shape.numel > kGrainElements) {
    for (Index update = 0; update < shape.count; ++update) body(update, threads);
    return;
  }
  parallel_for(shape.count, 1, threads.count, [&](Index begin, Index end) {
    for (Index update = begin; update < end; ++update) body(update, ThreadCount{1});
  });
}

// `body(begin, end)` for tiles of an update.
template <typename Body>
void for_tiles(Index numel, ThreadCount threads, Body body) {
  static_assert(kDitherTile == kSourceTile);
  const Index tiles = (numel + kDitherTile - 1) / kDitherTile;
  parallel_for(tiles, kGrainElements / kDitherTile, threads.count, body);
}

void write_products(const float* update, Index numel, const Source& previous, const Source& own,
                    const Groups& groups, double* products, ThreadCount threads) {
  const SourceProductsArgs args{update, previous, own, groups, products, numel};
  const Index grain = std::max<Index>(1, groups.count * kGrainElements / std::max<Index>(1, numel));
  parallel_for(groups.count, grain, threads.count,
               [&](Index begin, Index end) { active_kernels().source_products(args, begin, end); });
}

struct MatricesArg {
  std::vector<Matrix> matrices;
  float previous_weight;
  Index rows = 0, cols = 0;

  MatricesArg(const std::vector<Index>& shapes, float weight) : previous_weight(weight) {
    Index begin = 0;
    for (std::size_t i = 0; i + 1 < shapes.size(); i += 2) {
      matrices.push_back({begin, shapes[i], shapes[i + 1]});
      begin += shapes[i] * shapes[i + 1];
      rows = std::max(rows, shapes[i]);
      cols = std::max(cols, shapes[i + 1]);
    }
  }
  void write_energies(const Source& previous, const Source& own, Index numel, ThreadCount threads,
                      float* energies) const {
    const SourceEnergiesArgs args{previous, own, previous_weight, matrices.data(), energies};
    const auto count = static_cast<Index>(matrices.size());
    const Index grain = std::max<Index>(1, count * kGrainElements / std::max<Index>(1, numel));
    parallel_for(count, grain, threads.count, [&](Index begin, Index end) {
      std::vector<std::int64_t> of_row(static_cast<std::size_t>(rows));
      std::vector<std::int64_t> of_col(static_cast<std::size_t>(cols));
      std::vector<float> col(static_cast<std::size_t>(cols));
      const EnergySums sums{of_row.data(), of_col.data(), col.data()};
      active_kernels().source_energies(args, sums, begin, end);
    });
  }
};

void update_products(Address products, Address updates, ShapeArg shape, SourcesArg sources,
                     GroupsArg groups, ThreadCount threads) {
  const nb::gil_scoped_release release;
  for_each_update(shape, threads, [&](Index k, ThreadCount each) {
    write_products(at<const float>(updates) + k * shape.numel, shape.numel, sources.previous,
                   sources.own_of(k), groups,
                   at<double>(products) + k * groups.count * kNumProducts, each);
  });
}

void update_rows(Address predicted, Address contexts, Address rows, ShapeArg shape,
                 SourcesArg sources, const std::vector<float>& weights, MatricesArg matrices,
                 GroupsArg groups, const Addresses& tables, int num_classes,
                 const std::vector<int>& bases, LatticeArg lattice, ThreadCount threads) {
  const nb::gil_scoped_release release;
  const Kernels& kernels = active_kernels();
  for_each_update(shape, threads, [&](Index k, ThreadCount each) {
    const auto place = static_cast<std::size_t>(k);
    const Source& own = sources.own_of(k);
    const SourcePredictionArgs prediction{sources.previous,
                                          own,
                                          weights.data() + k * groups.count * 2,
                                          groups,
                                          at<float>(predicted) + k * shape.numel,
                                          shape.numel};
    std::vector<float> energies;
    if (sources.previous.values != nullptr || own.values != nullptr) {
      energies.resize(static_cast<std::size_t>(shape.numel));
      matrices.write_energies(sources.previous, own, shape.numel, each, energies.data());
    }
    const ScaleRowsArgs scale{energies.empty() ? nullptr : energies.data(),
                              at<const std::int16_t>(tables[place]),
                              num_classes,
                              groups,
                              bases[place],
                              at<std::int16_t>(contexts) + k * shape.numel,
                              at<std::int16_t>(rows) + k * shape.numel,
                              shape.numel,
                              lattice.dither(k)};
    for_tiles(shape.numel, each, [&](Index begin, Index end) {
      kernels.source_prediction(prediction, begin, end);
      kernels.scale_rows(scale, begin, end);
    });
  });
}

// What is kept of each update, or no update.
struct KeptArg {
  Addresses kept;
  const float* shares;
  int num_shares;

  KeptArg(Addresses kept_of, Address share_of, int count)
      : kept(std::move(kept_of)), shares(at<const float>(share_of)), num_shares(count) {}
  void write(Index update, const float* decoded, const float* predicted, const std::int16_t* rows,
             Index numel, Index begin, Index end) const {
    if (kept.empty()) return;
    const SourceHistoryArgs args{
        decoded, predicted,  rows,
        shares,  num_shares, at<std::uint16_t>(kept[static_cast<std::size_t>(update)]),
        numel};
    active_kernels().source_history(args, begin, end);
  }
};

void update_codes(Address codes, Address updates, Address predicted, Address rows, ShapeArg shape,
                  LatticeArg lattice, KeptArg kept, ThreadCount threads) {
  const nb::gil_scoped_release release;
  const Kernels& kernels = active_kernels();
  for_each_update(shape, threads, [&](Index k, ThreadCount each) {
    const Index at_row = k * shape.width;
    std::vector<float> decoded(static_cast<std::size_t>(kept.kept.empty() ? 0 : shape.width));
    const float* expected = at<const float>(predicted) + at_row;
    std::int16_t* found = at<std::int16_t>(codes) + at_row;
    const DitherQuantiseArgs quantise{at<const float>(updates) + at_row,
                                      expected,
                                      found,
                                      shape.width,
                                      lattice.step(k),
                                      lattice.dither(k)};
    const DitherDequantiseArgs dequantise{found,       expected,        decoded.data(),
                                          shape.width, lattice.step(k), lattice.dither(k)};
    for_tiles(shape.width, each, [&](Index begin, Index end) {
      kernels.dither_quantise(quantise, begin, end);
      if (decoded.empty()) return;
      kernels.dither_dequantise(dequantise, begin, end);
      kept.write(k, decoded.data(), expected, at<const std::int16_t>(rows) + k * shape.numel,
                 shape.numel, begin, end);
    });
  });
}

void update_values(Address values, Address residuals, Address products, Address codes,
                   Address predicted, Address rows, ShapeArg shape, LatticeArg lattice,
                   GroupsArg groups, KeptArg kept, ThreadCount threads) {
  const nb::gil_scoped_release release;
  const Kernels& kernels = active_kernels();
  for_each_update(shape, threads, [&](Index k, ThreadCount each) {
    const Index at_row = k * shape.numel;
    const float* expected = at<const float>(predicted) + at_row;
    float *decoded = at<float>(values) + at_row, *rest = at<float>(residuals) + at_row;
    const DitherDequantiseArgs dequantise{at<const std::int16_t>(codes) + k * shape.width,
                                          expected,
                                          decoded,
                                          shape.numel,
                                          lattice.step(k),
                                          lattice.dither(k)};
    for_tiles(shape.numel, each, [&](Index begin, Index end) {
      kernels.dither_dequantise(dequantise, begin, end);
      const Index last = std::min(end * kDitherTile, shape.numel);
      for (Index i = begin * kDitherTile; i < last; ++i) rest[i] = decoded[i] - expected[i];
      kept.write(k, decoded, expected, at<const std::int16_t>(rows) + at_row, shape.numel, begin,
                 end);
    });
    write_products(decoded, shape.numel, {rest, DType::kFloat32}, {nullptr, DType::kFloat32},
                   groups, at<double>(products) + k * groups.count * kNumProducts, each);
  });
}

void update_add(Address total, Address updates, Index numel, Index stride,
                const std::vector<double>& factors, ThreadCount threads) {
  const nb::gil_scoped_release release;
  const UpdateAddArgs args{at<const float>(updates), stride,
                           factors.data(),           static_cast<Index>(factors.size()),
                           at<double>(total),        numel};
  for_tiles(numel, threads,
            [&](Index begin, Index end) { active_kernels().update_add(args, begin, end); });
}

}  // namespace

void bind_updates(nb::module_& m) {
  nb::class_<ShapeArg>(m, "Updates").def(nb::init<Index, Index, Index>());
  nb::class_<SourcesArg>(m, "Sources")
      .def(nb::init<Address, int, const Addresses&, const std::vector<int>&>());
  nb::class_<MatricesArg>(m, "Matrices").def(nb::init<const std::vector<Index>&, float>());
  nb::class_<LatticeArg>(m, "Lattices")
      .def(nb::init<int, std::vector<float>, std::vector<std::uint64_t>>());
  nb::class_<KeptArg>(m, "Kept").def(nb::init<Addresses, Address, int>());
  m.def("update_products", &update_products);
  m.def("update_rows", &update_rows);
  m.def("update_codes", &update_codes);
  m.def("update_values", &update_values);
  m.def("update_add", &update_add);
}

}  // namespace commrt
