// Bit-level views of the three gradient dtypes. Every rounding is written out, so that g++ and nvcc
// agree to the last bit.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define COMMRT_HD static __host__ __device__ __forceinline__
#else
// Internal linkage: these headers are compiled once per instruction set, and a shared inline
// function would let the linker hand AVX-512 code to a machine without it.
#define COMMRT_HD static inline __attribute__((always_inline, unused))
#endif

namespace commrt {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

COMMRT_HD constexpr std::int64_t element_size(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

COMMRT_HD std::uint32_t float_to_bits(float x) {
  std::uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

COMMRT_HD float bits_to_float(std::uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

COMMRT_HD float bf16_to_float(std::uint16_t half) {
  return bits_to_float(static_cast<std::uint32_t>(half) << 16);
}

// Round to nearest even; NaN becomes the canonical quiet NaN, as in torch.
COMMRT_HD std::uint16_t float_to_bf16(float x) {
  const std::uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

COMMRT_HD float fp16_to_float(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x0400u) return bits_to_float(sign | ((magnitude << 13) + 0x38000000u));
  const float subnormal = static_cast<float>(magnitude) * 5.9604644775390625e-08f;  // 2^-24
  return bits_to_float(sign | float_to_bits(subnormal));
}

// Round to nearest even, overflow to infinity; NaN becomes the canonical quiet NaN.
COMMRT_HD std::uint16_t float_to_fp16(float x) {
  const std::uint32_t bits = float_to_bits(x);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x47800000u) return static_cast<std::uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Adding 2^-1 * 2^-1 = 0.5 places the fp16 subnormal grid (2^-24) at the last bit of the sum.
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u));
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
  return static_cast<std::uint16_t>(sign | (rounded >> 13));
}

}  // namespace commrt
