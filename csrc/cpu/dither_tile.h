// The piece of a window that the ops of the dither work on at a time, and its dither.
#pragma once

#include <type_traits>

#include "block.h"
#include "dither_lanes.h"

namespace commrt::COMMRT_ISA {

using V = Vf;
COMMRT_INLINE V magnitude(V x) { return as_floats(abs_bits(x)); }

}  // namespace commrt::COMMRT_ISA

#define COMMRT_RULES COMMRT_ISA
#define COMMRT_RULE COMMRT_INLINE
#include "../math/lattice.h"

namespace commrt::COMMRT_ISA {

constexpr int kStride = 8 * kLanes;  // sixteen points of E8

// Elements [first, first + count) of a window; whole strides of them are worked on.
struct Piece {
  std::int64_t first;
  int count;

  COMMRT_MEMBER int padded() const { return (count + kStride - 1) / kStride * kStride; }
  COMMRT_MEMBER bool is_whole() const { return count % kStride == 0; }
};

// Call body(piece) for each of the tiles [begin, end) of a window.
template <typename Body>
COMMRT_INLINE void for_each_piece(std::int64_t numel, std::int64_t begin, std::int64_t end,
                                  Body body) {
  for (std::int64_t tile = begin; tile < end; ++tile) {
    const std::int64_t first = tile * kDitherTile, left = numel - first;
    body(Piece{first, static_cast<int>(left < kDitherTile ? left : kDitherTile)});
  }
}

template <DType dtype>
using Element = std::conditional_t<dtype == DType::kFloat32, float, std::uint16_t>;

template <typename T>
struct alignas(64) Tile {
  T value[kDitherTile];
};

// A piece of what is read: where it lies, or in `tile` with zeros behind it; zeros for null.
template <typename T>
COMMRT_INLINE const T* open(const T* from, const Piece& piece, Tile<T>& tile) {
  static const Tile<T> zeros = {};
  if (from == nullptr) return zeros.value;
  if (piece.is_whole()) return from + piece.first;
  const auto count = static_cast<std::size_t>(piece.count);
  std::memcpy(tile.value, from + piece.first, sizeof(T) * count);
  std::memset(tile.value + count, 0, sizeof(T) * (kDitherTile - count));
  return tile.value;
}

// Let write(to) write a piece: where it belongs, or, if it has no whole strides, beside.
template <typename T, typename Write>
COMMRT_INLINE void write_piece(T* output, const Piece& piece, Write write) {
  if (piece.is_whole()) return write(output + piece.first);
  Tile<T> tile;
  write(tile.value);
  std::memcpy(output + piece.first, tile.value, sizeof(T) * static_cast<std::size_t>(piece.count));
}

// A piece's uniform numbers; it may begin anywhere in a group.
class Uniform {
 public:
  COMMRT_MEMBER Uniform(const Dither& dither, const Piece& piece) {
    const std::uint64_t index = dither.first_index + static_cast<std::uint64_t>(piece.first);
    before_ = static_cast<int>(index % kGroup);
    const int count = (before_ + piece.padded() + kGroup - 1) / kGroup * kGroup;
    fill_uniform(value_, count, dither.seed, Stream::kDither,
                 index - static_cast<unsigned>(before_));
  }
  COMMRT_MEMBER const float* begin() const { return value_ + before_; }

 private:
  alignas(64) float value_[kDitherTile + kGroup + kUniformSlack];
  int before_;
};

// From the elements of kCell vectors to a vector for each coordinate of their points, and back.
template <Lattice lattice>
COMMRT_INLINE void arrange(Vf (&x)[kCell<lattice>]) {
  if constexpr (lattice == Lattice::kE8) to_coordinates(x);
}
template <Lattice lattice>
COMMRT_INLINE void restore(Vf (&x)[kCell<lattice>]) {
  if constexpr (lattice == Lattice::kE8) to_elements(x);
}

// The dither of kCell vectors, arranged.
template <Lattice lattice>
COMMRT_INLINE void load_dither(const float* uniform, Vf (&u)[kCell<lattice>]) {
  for (int k = 0; k < kCell<lattice>; ++k) u[k] = load<DType::kFloat32>(uniform + k * kLanes);
  arrange<lattice>(u);
  to_dither<lattice>(u);
}

}  // namespace commrt::COMMRT_ISA
