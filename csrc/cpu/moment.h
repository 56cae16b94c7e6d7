// An optimizer's moment as fp32, a run of a row at a time. 8-bit moments are decoded on the way in and
// encoded when the largest of their segment is known.
#pragma once

#include <cstring>

#include "../math/moment.h"
#include "run.h"

namespace commrt::COMMRT_ISA {

template <MomentFormat format>
constexpr std::int64_t kMomentBytes = format == MomentFormat::kFloat32    ? 4
                                      : format == MomentFormat::kBFloat16 ? 2
                                                                          : 1;

template <MomentFormat format>
COMMRT_INLINE Vf decode_level(Vf code, Vf scale) {
  if constexpr (format == MomentFormat::kLinear8) return mul(code, scale);
  if constexpr (format == MomentFormat::kSquare8) {
    return mul(mul(code, as_floats(abs_bits(code))), scale);
  }
  const Vf level = add(code, broadcast(kUnsignedBias)), square = mul(level, level);
  return mul(mul(square, square), scale);
}

// The code of a level between two of them, still to be rounded.
template <MomentFormat format>
COMMRT_INLINE Vf encode_level(Vf x, Vf inverse) {
  if constexpr (format == MomentFormat::kLinear8) return mul(x, inverse);
  if constexpr (format == MomentFormat::kSquare8) {
    return copy_sign(sqrt(mul(as_floats(abs_bits(x)), inverse)), x);
  }
  const Vf one = where_greater(x, broadcast(0.0f), broadcast(1.0f));
  const Vf level = sqrt(sqrt(mul(x, inverse)));
  const Vf least = sub(one, where_greater(level, one, one));  // 1 where the level is below
  const Vf raised = add(where_greater(level, one, level), least);
  return sub(raised, broadcast(kUnsignedBias));
}

// Up or down, such that the expectation of what the code stands for is x.
template <MomentFormat format>
COMMRT_INLINE Vf round_level(Vf code, Vf x, Vf inverse, const float* uniform) {
  const Vf u = load<DType::kFloat32>(uniform);
  if constexpr (format == MomentFormat::kLinear8) {
    const Vf below = floor(code);
    return clamp(add(below, where_greater(sub(code, below), u, broadcast(1.0f))), 127.0f);
  }
  const Vf magnitude = as_floats(abs_bits(code)), below = floor(magnitude);
  const Vf level = mul(as_floats(abs_bits(x)), inverse);
  const Vf distance = sub(level, mul(below, below));  // of 2 below + 1
  const Vf threshold = mul(u, add(add(below, below), broadcast(1.0f)));
  const Vf rounded = add(below, where_greater(distance, threshold, broadcast(1.0f)));
  return copy_sign(clamp(rounded, 127.0f), x);
}

// A moment's elements of one run.
template <MomentFormat format>
class OpenMoment {
  static constexpr bool kIsCoded = kMomentBytes<format> == 1;

 public:
  COMMRT_MEMBER OpenMoment(const Moment& moment, const StepTensor& tensor, const Run& run)
      : values_(static_cast<std::uint8_t*>(moment.values) +
                offset_of(tensor, run) * kMomentBytes<format>) {
    if constexpr (kIsCoded) {
      scales_ = moment.scales + run.row * segments_per_row(tensor) + run.col / kSegment;
    }
  }

  COMMRT_MEMBER void begin(int segment) {
    if constexpr (kIsCoded) {
      scale_ = broadcast(scales_[segment]);
      most_ = zero_words();
    }
  }

  COMMRT_MEMBER Group load_at(int i) const { return decode(values_ + i * kMomentBytes<format>); }

  COMMRT_MEMBER void store_at(int i, Group x) {
    if constexpr (kIsCoded) {
      most_ = max_words(most_, max_words(abs_bits(x.first), abs_bits(x.second)));
      return store_group(buffer_.value + i, x);
    }
    write(values_ + i * kMomentBytes<format>, x);
  }

  // The same for `count` elements, fewer than a group.
  COMMRT_MEMBER Group load_last(int i, int count) const {
    std::uint8_t bytes[kGroup * kMomentBytes<format>] = {};
    if constexpr (format == MomentFormat::kFourth8) std::memset(bytes, kUnsignedBias, kGroup);
    std::memcpy(bytes, values_ + i * kMomentBytes<format>,
                static_cast<std::size_t>(count * kMomentBytes<format>));
    return decode(bytes);
  }
  COMMRT_MEMBER void store_last(int i, int count, Group x) {
    if constexpr (kIsCoded) return store_at(i, x);
    std::uint8_t bytes[kGroup * kMomentBytes<format>];
    write(bytes, x);
    std::memcpy(values_ + i * kMomentBytes<format>, bytes,
                static_cast<std::size_t>(count * kMomentBytes<format>));
  }

  COMMRT_MEMBER void end(int segment) {
    if constexpr (kIsCoded) absmax_[segment] = max_lanes(most_);
  }

  // Scales and codes of all segments; this loop hides the divisions of one behind the others.
  COMMRT_MEMBER void close(int count, const float* uniform) {
    if constexpr (kIsCoded) {
      float inverse[kRunSegments];
      const int segments = (count + kSegment - 1) / kSegment;
      for (int s = 0; s < segments; ++s) {
        const MomentScale scale = moment_scale(absmax_[s], format);
        scales_[s] = scale.scale;
        inverse[s] = scale.inverse;
      }
      for (int s = 0; s < segments; ++s) {
        const int first = s * kSegment, valid = count - first < kSegment ? count - first : kSegment;
        const Vf by = broadcast(inverse[s]);
        int i = first;
        COMMRT_UNROLL
        for (; i + kGroup <= first + valid; i += kGroup) {
          store_codes<8>(values_ + i, codes(i, by, inverse[s], uniform));
        }
        if (i == first + valid) continue;
        std::uint8_t last[kGroup];
        store_codes<8>(last, codes(i, by, inverse[s], uniform));
        std::memcpy(values_ + i, last, static_cast<std::size_t>(first + valid - i));
      }
    }
  }

  // The cache lines of a group `ahead` elements ahead.
  COMMRT_MEMBER void fetch(int i, int ahead) const {
    const std::uint8_t* from = values_ + (i + ahead) * kMomentBytes<format>;
    if (!kIsCoded || i % 64 == 0) prefetch(from);
    if constexpr (kMomentBytes<format> == 4) prefetch(from + 64);
  }

 private:
  COMMRT_MEMBER Group decode(const std::uint8_t* from) const {
    if constexpr (kIsCoded) {
      const Group code = load_codes<8>(from);
      return {decode_level<format>(code.first, scale_), decode_level<format>(code.second, scale_)};
    } else if constexpr (format == MomentFormat::kBFloat16) {
      return {load<DType::kBFloat16>(from), load<DType::kBFloat16>(from + 2 * kLanes)};
    } else {
      return {load<DType::kFloat32>(from), load<DType::kFloat32>(from + 4 * kLanes)};
    }
  }

  COMMRT_MEMBER static void write(std::uint8_t* to, Group x) {
    constexpr DType dtype = format == MomentFormat::kBFloat16 ? DType::kBFloat16 : DType::kFloat32;
    store<dtype>(to, x.first);
    store<dtype>(to + kMomentBytes<format> * kLanes, x.second);
  }

  // Zeros where the inverse is: not whatever a NaN becomes as a code.
  COMMRT_MEMBER Group codes(int i, Vf by, float inverse, const float* uniform) const {
    const Vf zero = broadcast(format == MomentFormat::kFourth8 ? -kUnsignedBias : 0.0f);
    if (inverse == 0.0f) return {zero, zero};
    const Group x = load_group(buffer_.value + i);
    Group code = {encode_level<format>(x.first, by), encode_level<format>(x.second, by)};
    if constexpr (format != MomentFormat::kFourth8) {
      if (uniform != nullptr) {
        code.first = round_level<format>(code.first, x.first, by, uniform + i);
        code.second = round_level<format>(code.second, x.second, by, uniform + i + kLanes);
      }
    }
    return code;
  }

  std::uint8_t* values_;
  float* scales_ = nullptr;
  Vf scale_;
  Vu most_;
  std::uint32_t absmax_[kRunSegments];
  TileBuffer buffer_;
};

}  // namespace commrt::COMMRT_ISA
