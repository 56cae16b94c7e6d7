// A source's elements as fp32, whatever it is.
#pragma once

#include "../sources.h"
#include "simd.h"

namespace commrt::COMMRT_ISA {

struct Zeros {
  COMMRT_MEMBER float operator[](std::int64_t) const { return 0.0f; }
};
struct Floats {
  const float* at;
  COMMRT_MEMBER float operator[](std::int64_t i) const { return at[i]; }
};
struct Halves {
  const std::uint16_t* at;
  COMMRT_MEMBER float operator[](std::int64_t i) const { return bf16_to_float(at[i]); }
};

// Call body(values), in which the elements are those from `begin` on.
template <typename Body>
COMMRT_INLINE void with_values(const Source& source, std::int64_t begin, Body body) {
  if (source.values == nullptr) return body(Zeros{});
  if (source.dtype == DType::kFloat32) {
    return body(Floats{static_cast<const float*>(source.values) + begin});
  }
  body(Halves{static_cast<const std::uint16_t*>(source.values) + begin});
}

// NaN stays NaN.
COMMRT_INLINE float clamp_between(float x, float least, float most) {
  x = x < least ? least : x;
  return x > most ? most : x;
}

}  // namespace commrt::COMMRT_ISA
