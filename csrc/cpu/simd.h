// Sixteen fp32 lanes, the same on every instruction set. The kernels are written once on top of these
// few functions and compiled once per instruction set, inside namespace commrt::COMMRT_ISA:
//
//   Vf            sixteen fp32 lanes         Vu             sixteen uint32 lanes
//   load<DType>   store<DType>  stream<DType>   lanes from and to memory; stream() bypasses the caches
//   exact_fma     a * b + c where a * b is exact, so fusing cannot change the result
//   copy_sign     the sign of the second on the first, which has none
//   sum_lanes     pairwise: lane i with lane i + 8, then + 4, + 2, + 1
//   load_codes<bits>  store_codes<bits>   the codes of a group, 32 elements, as commrt/ops/format.py
//                 lays them out; storing rounds to nearest even
//   fill_uniform  the random numbers of elements [index, index + count), both multiples of 32; writes
//                 up to kUniformSlack floats more
//
// Lane i of a vector is element i, also in sums, so the order of additions is part of the format.
#pragma once

#include <cstdint>

#include "../math/float_bits.h"
#include "../math/philox.h"

#define COMMRT_INLINE static inline __attribute__((always_inline, unused))

// Phases of a tile are compiled once for each parameter they depend on, not for every combination.
#define COMMRT_PHASE static __attribute__((noinline, unused))
#define COMMRT_MEMBER inline __attribute__((always_inline))
#define COMMRT_INLINE_LAMBDA __attribute__((always_inline))

#if !defined(COMMRT_ISA)
#error "compile with -DCOMMRT_ISA=portable|avx2|avx512"
#endif

#if defined(COMMRT_USE_AVX512)
#include "simd_avx512.h"
#elif defined(COMMRT_USE_AVX2)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace commrt::COMMRT_ISA {

constexpr int kLanes = 16;
constexpr int kGroup = 32;  // elements whose codes are packed together
constexpr int kUniformSlack = 32;

}  // namespace commrt::COMMRT_ISA
