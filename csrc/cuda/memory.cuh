// Eight consecutive elements, or their codes, from and to memory: by vectors of 16 bytes where the
// address allows, element by element otherwise and where a tensor ends.
#pragma once

#include "../ops.h"
#include "platform.cuh"

namespace commrt::cuda {

constexpr int kPerLane = 8;

__device__ __forceinline__ bool is_aligned(const void* address, int num_bytes) {
  return reinterpret_cast<std::uintptr_t>(address) % static_cast<unsigned>(num_bytes) == 0;
}

// How many of the eight elements from `element` on the window has.
__device__ __forceinline__ int count_valid(const Window& window, std::int64_t element) {
  const std::int64_t left = window.numel - element;
  return static_cast<int>(left < 0 ? 0 : left < kPerLane ? left : kPerLane);
}

// -- one element ----------------------------------------------------------------------------------

template <DType dtype>
__device__ __forceinline__ float widen(std::uint16_t half) {
  return dtype == DType::kBFloat16 ? bf16_to_float(half) : __half2float(__ushort_as_half(half));
}

// NaN as on a CPU: a GPU's is another one.
template <DType dtype>
__device__ __forceinline__ std::uint16_t narrow(float x) {
  if (dtype == DType::kBFloat16) return float_to_bf16(x);
  return x == x ? __half_as_ushort(__float2half_rn(x)) : std::uint16_t{0x7e00};
}

__device__ __forceinline__ float load_one(const Window& window, std::int64_t element) {
  const auto* halves = static_cast<const std::uint16_t*>(window.data) + element;
  switch (window.dtype) {
    case DType::kBFloat16: return widen<DType::kBFloat16>(*halves);
    case DType::kFloat16: return widen<DType::kFloat16>(*halves);
    default: return static_cast<const float*>(window.data)[element];
  }
}

// -- eight elements -------------------------------------------------------------------------------

__device__ __forceinline__ void load_floats(const float* from, int valid, float (&x)[kPerLane]) {
  if (valid == kPerLane && is_aligned(from, 16)) {
    const auto* vectors = reinterpret_cast<const uint4*>(from);
    const uint4 low = __ldcs(vectors), high = __ldcs(vectors + 1);
    const std::uint32_t words[] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] = bits_to_float(words[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) x[i] = i < valid ? from[i] : 0.0f;
}

template <DType dtype>
__device__ __forceinline__ void load_halves(const std::uint16_t* from, int valid,
                                            float (&x)[kPerLane]) {
  if (valid == kPerLane && is_aligned(from, 16)) {
    const uint4 vector = __ldcs(reinterpret_cast<const uint4*>(from));
    const std::uint32_t words[] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      x[i] = widen<dtype>(static_cast<std::uint16_t>(words[i / 2] >> 16 * (i % 2)));
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) x[i] = i < valid ? widen<dtype>(from[i]) : 0.0f;
}

// Zeros where the window has ended.
__device__ __forceinline__ void load(const Window& window, std::int64_t element,
                                     float (&x)[kPerLane]) {
  const int valid = count_valid(window, element);
  const auto* halves = static_cast<const std::uint16_t*>(window.data) + element;
  switch (window.dtype) {
    case DType::kBFloat16: return load_halves<DType::kBFloat16>(halves, valid, x);
    case DType::kFloat16: return load_halves<DType::kFloat16>(halves, valid, x);
    default: return load_floats(static_cast<const float*>(window.data) + element, valid, x);
  }
}

__device__ __forceinline__ void store_floats(float* to, int valid, const float (&x)[kPerLane]) {
  if (valid == kPerLane && is_aligned(to, 16)) {
    std::uint32_t words[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) words[i] = float_to_bits(x[i]);
    auto* vectors = reinterpret_cast<uint4*>(to);
    __stcs(vectors, make_uint4(words[0], words[1], words[2], words[3]));
    __stcs(vectors + 1, make_uint4(words[4], words[5], words[6], words[7]));
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (i < valid) to[i] = x[i];
  }
}

template <DType dtype>
__device__ __forceinline__ void store_halves(std::uint16_t* to, int valid,
                                             const float (&x)[kPerLane]) {
  if (valid == kPerLane && is_aligned(to, 16)) {
    std::uint32_t words[kPerLane / 2];
#pragma unroll
    for (int i = 0; i < kPerLane / 2; ++i) {
      words[i] = narrow<dtype>(x[2 * i]) | std::uint32_t{narrow<dtype>(x[2 * i + 1])} << 16;
    }
    __stcs(reinterpret_cast<uint4*>(to), make_uint4(words[0], words[1], words[2], words[3]));
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (i < valid) to[i] = narrow<dtype>(x[i]);
  }
}

// What lies beyond the window is not written.
__device__ __forceinline__ void store(const Window& window, std::int64_t element,
                                      const float (&x)[kPerLane]) {
  const int valid = count_valid(window, element);
  auto* halves = static_cast<std::uint16_t*>(window.data) + element;
  switch (window.dtype) {
    case DType::kBFloat16: return store_halves<DType::kBFloat16>(halves, valid, x);
    case DType::kFloat16: return store_halves<DType::kFloat16>(halves, valid, x);
    default: return store_floats(static_cast<float*>(window.data) + element, valid, x);
  }
}

// -- codes ----------------------------------------------------------------------------------------

// Eight codes of `bits` bits have as many bytes.
template <int bits>
__device__ __forceinline__ std::uint64_t load_word(const std::uint8_t* from) {
  if (is_aligned(from, bits)) {
    if constexpr (bits == 8) {
      const uint2 word = __ldcs(reinterpret_cast<const uint2*>(from));
      return word.x | std::uint64_t{word.y} << 32;
    }
    if constexpr (bits == 4) return __ldcs(reinterpret_cast<const std::uint32_t*>(from));
    if constexpr (bits == 2) return __ldcs(reinterpret_cast<const std::uint16_t*>(from));
    if constexpr (bits == 1) return *from;
  }
  std::uint64_t word = 0;
#pragma unroll
  for (int i = 0; i < bits; ++i) word |= std::uint64_t{from[i]} << 8 * i;
  return word;
}

template <int bits>
__device__ __forceinline__ void store_word(std::uint8_t* to, std::uint64_t word) {
  if (is_aligned(to, bits)) {
    if constexpr (bits == 8) {
      const uint2 vector =
          make_uint2(static_cast<std::uint32_t>(word), static_cast<std::uint32_t>(word >> 32));
      return __stcs(reinterpret_cast<uint2*>(to), vector);
    }
    if constexpr (bits == 4) {
      return __stcs(reinterpret_cast<std::uint32_t*>(to), static_cast<std::uint32_t>(word));
    }
    if constexpr (bits == 2) {
      return __stcs(reinterpret_cast<std::uint16_t*>(to), static_cast<std::uint16_t>(word));
    }
    if constexpr (bits == 1) {
      *to = static_cast<std::uint8_t>(word);
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < bits; ++i) to[i] = static_cast<std::uint8_t>(word >> 8 * i);
}

// Scales may lie at any address.
__device__ __forceinline__ std::uint16_t load_scale(const std::uint16_t* from) {
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(from);
  return static_cast<std::uint16_t>(bytes[0] | bytes[1] << 8);
}

__device__ __forceinline__ void store_scale(std::uint16_t* to, std::uint16_t scale) {
  auto* bytes = reinterpret_cast<std::uint8_t*>(to);
  bytes[0] = static_cast<std::uint8_t>(scale);
  bytes[1] = static_cast<std::uint8_t>(scale >> 8);
}

}  // namespace commrt::cuda
