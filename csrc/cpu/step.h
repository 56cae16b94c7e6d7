// The loop that all optimizer steps are: weights, moments and gradient of a run, and a rule for sixteen
// elements. Compiled for each dtype of gradients and storage of moments; formats of weights are phases
// before and after.
#pragma once

#include <tuple>
#include <utility>

#include "moment.h"
#include "weights.h"

namespace commrt::COMMRT_ISA {

using V = Vf;
COMMRT_INLINE V magnitude(V x) { return as_floats(abs_bits(x)); }

}  // namespace commrt::COMMRT_ISA

#define COMMRT_RULES COMMRT_ISA
#define COMMRT_RULE COMMRT_MEMBER
#include "../math/rules.h"

namespace commrt::COMMRT_ISA {

// rule(i, gradient, weight, moments) changes elements i to i + 15 of the run.
template <DType dtype, Storage storage, typename Rule, std::size_t... k>
COMMRT_PHASE void step_run(const StepTensor& tensor, const Run& run, const Rule& given,
                           std::index_sequence<k...>) {
  const Rule rule = given;  // into registers: what is stored through pointers could change `given`
  constexpr std::int64_t size = element_size(dtype);
  constexpr int count_k = sizeof...(k);
  const auto* grad = static_cast<const std::uint8_t*>(tensor.grad) + offset_of(tensor, run) * size;
  TileBuffer weight_buffer;
  DrawBuffer draws;
  float* weight = open_weights(tensor, run, weight_buffer);
  std::tuple<OpenMoment<kMomentFormat<Rule, storage, k>>...> moments{
      OpenMoment<kMomentFormat<Rule, storage, k>>(tensor.moments[k], tensor, run)...};
  const auto apply = [&](int i, Group g, Group& w, Group(&m)[count_k]) COMMRT_INLINE_LAMBDA {
    Vf first[count_k] = {m[k].first...}, second[count_k] = {m[k].second...};
    rule(i, g.first, w.first, first);
    rule(i + kLanes, g.second, w.second, second);
    ((m[k] = {first[k], second[k]}), ...);
  };
  constexpr int ahead = kAhead<storage>;
  constexpr int stretch = storage == Storage::kEightBits ? kSegment : kRun;
  for (int begin = 0, segment = 0; begin < run.count; begin += stretch, ++segment) {
    const int end = begin + stretch < run.count ? begin + stretch : run.count;
    (std::get<k>(moments).begin(segment), ...);
    int i = begin;
    COMMRT_UNROLL
    for (; i + kGroup <= end; i += kGroup) {
      prefetch(grad + (i + ahead) * size);
      prefetch(weight + i + ahead);
      prefetch(weight + i + ahead + kLanes);
      (std::get<k>(moments).fetch(i, ahead), ...);
      Group w = load_group(weight + i), m[count_k] = {std::get<k>(moments).load_at(i)...};
      const std::uint8_t* g = grad + i * size;
      apply(i, {load<dtype>(g), load<dtype>(g + kLanes * size)}, w, m);
      store_group(weight + i, w);
      (std::get<k>(moments).store_at(i, m[k]), ...);
    }
    if (i < end) {
      const int count = end - i;
      float last_weight[kGroup] = {};
      std::uint8_t g[kGroup * size] = {};
      std::memcpy(last_weight, weight + i, sizeof(float) * static_cast<std::size_t>(count));
      std::memcpy(g, grad + i * size, static_cast<std::size_t>(count * size));
      Group w = load_group(last_weight), m[count_k] = {std::get<k>(moments).load_last(i, count)...};
      apply(i, {load<dtype>(g), load<dtype>(g + kLanes * size)}, w, m);
      store_group(last_weight, w);
      std::memcpy(weight + i, last_weight, sizeof(float) * static_cast<std::size_t>(count));
      (std::get<k>(moments).store_last(i, count, m[k]), ...);
    }
    (std::get<k>(moments).end(segment), ...);
  }
  const float* uniform = storage == Storage::kEightBits && tensor.stochastic
                             ? draw(tensor, run, Stream::kMoment, draws)
                             : nullptr;
  (std::get<k>(moments).close(run.count, k == 0 ? uniform : nullptr), ...);
  close_weights(weight, tensor, run);
}

template <DType dtype, typename Rule>
COMMRT_INLINE void step_run(const StepTensor& tensor, const Run& run, const Rule& rule) {
  constexpr auto all = std::make_index_sequence<Rule::kMoments>{};
  switch (tensor.storage) {
    case Storage::kFloat32: return step_run<dtype, Storage::kFloat32>(tensor, run, rule, all);
    case Storage::kBFloat16: return step_run<dtype, Storage::kBFloat16>(tensor, run, rule, all);
    default: return step_run<dtype, Storage::kEightBits>(tensor, run, rule, all);
  }
}

// Call body(tensor, first, last) for what units [begin, end) of the list have of each tensor, counted
// from its first unit.
template <typename List, typename Body>
COMMRT_INLINE void for_each_tensor(const List& list, std::int64_t begin, std::int64_t end,
                                   Body body) {
  int index = 0;
  while (list.first_unit[index + 1] <= begin) ++index;
  for (; index < list.count && list.first_unit[index] < end; ++index) {
    const std::int64_t first = list.first_unit[index], after = list.first_unit[index + 1];
    body(list.tensors[index], (begin > first ? begin : first) - first,
         (end < after ? end : after) - first);
  }
}

// A rule that knows no rows, on units of kUnitElements / kSegment segments.
template <typename Rule>
COMMRT_INLINE void step_segments(const StepList& list, std::int64_t begin, std::int64_t end) {
  struct AtAnyPlace : Rule {
    using Rule::Rule;
    COMMRT_MEMBER void operator()(int, V g, V& w, V (&m)[Rule::kMoments]) const {
      Rule::operator()(g, w, m);
    }
  };
  constexpr std::int64_t per_unit = kUnitElements / kSegment;
  for_each_tensor(list, begin, end, [&](const StepTensor& tensor, auto first, auto last) {
    const AtAnyPlace rule(list.options, tensor);
    const std::int64_t per_row = segments_per_row(tensor), total = tensor.rows * per_row;
    const std::int64_t end_segment = last * per_unit < total ? last * per_unit : total;
    with_dtype(tensor.grad_dtype, [&]<DType dtype>() {
      for (std::int64_t segment = first * per_unit; segment < end_segment;) {
        const std::int64_t row = segment / per_row, col = segment % per_row * kSegment;
        std::int64_t taken = per_row - segment % per_row;
        taken = taken < kRunSegments ? taken : kRunSegments;
        taken = taken < end_segment - segment ? taken : end_segment - segment;
        const std::int64_t left = tensor.cols - col;
        const auto count = static_cast<int>(left < taken * kSegment ? left : taken * kSegment);
        step_run<dtype>(tensor, Run{row, col, count}, rule);
        segment += taken;
      }
    });
  });
}

}  // namespace commrt::COMMRT_ISA
