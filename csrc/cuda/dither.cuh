// dither_quantise, dither_dequantise and scale_rows: eight elements a thread, or one point of E8.
#pragma once

#include "../math/scale_class.h"
#include "bits.cuh"
#include "lane.cuh"
#include "tile.cuh"

#define COMMRT_RULES cuda
#define COMMRT_RULE __device__ __forceinline__
#include "../math/lattice.h"

namespace commrt::cuda {

// The eight elements of a thread begin at a multiple of eight of the whole tensor, so that they have two
// counters. The window has those from `begin` to `end` of them, which may be none.
struct Eight {
  std::int64_t element;  // the first one, counted from the window's first
  int begin, end;

  __device__ __forceinline__ Eight(std::int64_t numel, const Dither& dither) {
    const auto before = static_cast<int>(dither.first_index % kPerLane);
    element = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * kPerLane - before;
    const std::int64_t left = numel - element;
    begin = element < 0 ? before : 0;
    end = static_cast<int>(left < 0 ? 0 : left < kPerLane ? left : kPerLane);
  }
  __device__ __forceinline__ bool is_whole() const { return begin == 0 && end == kPerLane; }
  __device__ __forceinline__ bool has(int i) const { return i >= begin && i < end; }
};

// Zeros where there are none, also everywhere for null.
__device__ __forceinline__ void load(const float* from, const Eight& at, float (&x)[kPerLane]) {
  const Window all{const_cast<float*>(from), DType::kFloat32, at.element + at.end, 0};
  if (from != nullptr && at.is_whole()) return load(all, at.element, x);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    x[i] = from != nullptr && at.has(i) ? load_one(all, at.element + i) : 0.0f;
  }
}
__device__ __forceinline__ void load(const std::int16_t* from, const Eight& at,
                                     std::uint16_t (&x)[kPerLane]) {
  const auto* bits = reinterpret_cast<const std::uint16_t*>(from) + at.element;
  if (at.is_whole()) return load_bits(bits, kPerLane, x);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) x[i] = at.has(i) ? bits[i] : std::uint16_t{0};
}

__device__ __forceinline__ void store(float* to, const Eight& at, const float (&x)[kPerLane]) {
  if (at.is_whole()) return store_floats(to + at.element, kPerLane, x);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (at.has(i)) to[at.element + i] = x[i];
  }
}
__device__ __forceinline__ void store(std::int16_t* to, const Eight& at,
                                      const std::uint16_t (&x)[kPerLane]) {
  auto* bits = reinterpret_cast<std::uint16_t*>(to) + at.element;
  if (at.is_whole()) return store_bits(bits, kPerLane, x);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (at.has(i)) bits[i] = x[i];
  }
}

template <Lattice lattice>
__device__ __forceinline__ void draw_dither(const Dither& dither, const Eight& at,
                                            float (&u)[kPerLane]) {
  const std::uint64_t index = dither.first_index + static_cast<std::uint64_t>(at.element);
#pragma unroll
  for (int i = 0; i < kPerLane; i += 4) {
    const Philox4 draw = philox(dither.seed, Stream::kDither, (index + i) / 4);
#pragma unroll
    for (int k = 0; k < 4; ++k) u[i + k] = uniform_from_word(draw.word[k]);
  }
  to_dither<lattice>(u);
}

template <Lattice lattice>
__global__ void __launch_bounds__(kThreads) dither_quantise_kernel(DitherQuantiseArgs args) {
  const Eight at(args.numel, args.dither);
  float x[kPerLane], predicted[kPerLane], u[kPerLane];
  load(args.values, at, x);
  load(args.predicted, at, predicted);
  draw_dither<lattice>(args.dither, at, u);
  const float inverse_step = 1.0f / args.step;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    x[i] = clamp_number((x[i] - predicted[i]) * inverse_step + u[i], kLimit<lattice>);
  }
  to_codes<lattice>(x);
  std::uint16_t codes[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int code = x[i] == x[i] ? static_cast<int>(round_even(x[i])) : kNanCode;
    codes[i] = static_cast<std::uint16_t>(code);
  }
  store(args.codes, at, codes);
}

template <Lattice lattice>
__global__ void __launch_bounds__(kThreads) dither_dequantise_kernel(DitherDequantiseArgs args) {
  const Eight at(args.numel, args.dither);
  std::uint16_t codes[kPerLane];
  float x[kPerLane], u[kPerLane];
  load(args.codes, at, codes);
  load(args.predicted, at, x);
  draw_dither<lattice>(args.dither, at, u);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const auto code = static_cast<std::int16_t>(codes[i]);
    const float offset = static_cast<float>(code) * kUnit<lattice> - u[i];
    x[i] = code == kNanCode ? bits_to_float(0x7fc00000u) : fmaf(args.step, offset, x[i]);
  }
  store(args.values, at, x);
}

template <Lattice lattice>
__global__ void __launch_bounds__(kThreads) scale_rows_kernel(ScaleRowsArgs args) {
  const Eight at(args.numel, args.dither);
  float energies[kPerLane], u[kPerLane];
  load(args.energies, at, energies);
  draw_dither<lattice>(args.dither, at, u);
  std::uint16_t places[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int index = scale_class(energies[i], args.base, args.num_classes);
    places[i] = static_cast<std::uint16_t>(context_of(index, to_phase<lattice>(u[i])));
  }
  if (args.contexts != nullptr) store(args.contexts, at, places);
  int group = group_of(args.groups, at.element + at.begin);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    group = next_group(args.groups, group, at.element + i);
    const std::int16_t* rows_of_class = args.rows_of_class + std::int64_t{group} * args.num_classes;
    const std::int16_t row = row_of_context(rows_of_class, places[i]);
    places[i] = static_cast<std::uint16_t>(row);
  }
  store(args.rows, at, places);
}

}  // namespace commrt::cuda
