// The lattices of the dither, for vectors of a CPU or the elements of a GPU's thread: V, with broadcast,
// add, sub, mul, magnitude, round_even, where_less and where_equal of the namespace that includes this.
#pragma once

#include "../dither.h"

#if !defined(COMMRT_RULES)
#error "define COMMRT_RULES, the namespace, and COMMRT_RULE, how its functions are declared"
#endif

namespace commrt::COMMRT_RULES {

// Coordinates of a point, each in a V.
template <Lattice lattice>
constexpr int kCell = lattice == Lattice::kE8 ? 8 : 1;

// A point's coordinates are these parts of its codes.
template <Lattice lattice>
constexpr float kUnit = lattice == Lattice::kE8 ? 0.5f : 1.0f;

// Whose nearest point has codes of sixteen bits.
template <Lattice lattice>
constexpr float kLimit = lattice == Lattice::kE8 ? 16382.0f : 32767.0f;

// 1 where a whole number is odd, else 0.
COMMRT_RULE V odd(V number) {
  const V half = round_even(mul(number, broadcast(0.5f)));
  return magnitude(sub(number, add(half, half)));
}

// What rounding coordinates of a point to integers comes to.
struct Rounded {
  V sum;              // of the integers
  V sides;            // +1 for each coordinate, -1 where it is below its integer
  V saved;            // in squared distance by rounding to halves instead
  V most, at_most;    // the coordinate furthest from its integer,
  V least, at_least;  // and the nearest one
};

COMMRT_RULE Rounded rounded(V x, int place) {
  const V sum = round_even(x), offset = sub(x, sum), distance = magnitude(offset);
  const V sides = where_less(offset, broadcast(0.0f), broadcast(-1.0f), broadcast(1.0f));
  const V at = broadcast(static_cast<float>(place));
  return {sum, sides, sub(distance, broadcast(0.25f)), distance, at, distance, at};
}

// Coordinates of a come before those of b.
COMMRT_RULE Rounded joined(const Rounded& a, const Rounded& b) {
  return {add(a.sum, b.sum),
          add(a.sides, b.sides),
          add(a.saved, b.saved),
          where_less(a.most, b.most, b.most, a.most),
          where_less(a.most, b.most, b.at_most, a.at_most),
          where_less(b.least, a.least, b.least, a.least),
          where_less(b.least, a.least, b.at_least, a.at_least)};
}

// Coordinates i and i + 1; in this order few of them are in registers at a time.
COMMRT_RULE Rounded round_two(const V (&x)[8], int i, V (&integer)[8], V (&side)[8]) {
  const Rounded a = rounded(x[i], i), b = rounded(x[i + 1], i + 1);
  integer[i] = a.sum;
  integer[i + 1] = b.sum;
  side[i] = a.sides;
  side[i + 1] = b.sides;
  return joined(a, b);
}

// Twice the nearest point of E8; commrt/ops/reference/dither.py says why it is. NaN in any coordinate
// is NaN in all.
COMMRT_RULE void nearest_e8(const V (&x)[8], V (&twice)[8]) {
  V integer[8], side[8];
  const Rounded first = joined(round_two(x, 0, integer, side), round_two(x, 2, integer, side));
  const Rounded second = joined(round_two(x, 4, integer, side), round_two(x, 6, integer, side));
  const Rounded all = joined(first, second);
  // Half of the sides is four more than what rounding to halves adds to the sum.
  const V zero = broadcast(0.0f), half = broadcast(0.5f), one = broadcast(1.0f);
  const V is_odd = odd(all.sum), is_odd_half = odd(add(all.sum, mul(all.sides, half)));
  const V cost = mul(is_odd, sub(one, add(all.most, all.most)));
  const V half_cost = sub(mul(is_odd_half, add(all.least, all.least)), all.saved);
  const V nowhere = broadcast(8.0f);
  const V at = where_less(half_cost, cost, where_less(half, is_odd_half, all.at_least, nowhere),
                          where_less(half, is_odd, all.at_most, nowhere));
  const V nothing = mul(all.saved, zero);  // or NaN
  const V unmoved = add(nothing, where_less(half_cost, cost, one, zero));
  const V moved = add(nothing, where_less(half_cost, cost, broadcast(-1.0f), broadcast(2.0f)));
  for (int i = 0; i < 8; ++i) {
    const V sides_away = where_equal(at, broadcast(static_cast<float>(i)), moved, unmoved);
    twice[i] = add(add(integer[i], integer[i]), mul(side[i], sides_away));
  }
}

// From uniform numbers to the dither: of one point of E8, or of any integers.
template <Lattice lattice, int count>
COMMRT_RULE void to_dither(V (&u)[count]) {
  if constexpr (lattice == Lattice::kE8) {
    V twice[8];
    for (int i = 0; i < 8; ++i) u[i] = add(u[i], u[i]);
    nearest_e8(u, twice);
    for (int i = 0; i < 8; ++i) u[i] = sub(u[i], mul(twice[i], broadcast(0.5f)));
  } else {
    for (int i = 0; i < count; ++i) u[i] = sub(u[i], broadcast(0.5f));
  }
}

// From dithered values, in steps and within the limit, to codes; those of kZ still to be rounded.
template <Lattice lattice, int count>
COMMRT_RULE void to_codes(V (&x)[count]) {
  if constexpr (lattice == Lattice::kE8) {
    V twice[8];
    nearest_e8(x, twice);
    for (int i = 0; i < 8; ++i) x[i] = twice[i];
  }
}

// The sixteenth of its range that the dither is in, and a fraction.
template <Lattice lattice>
COMMRT_RULE V to_phase(V u) {
  if constexpr (lattice == Lattice::kE8) {
    const V phase = mul(add(u, broadcast(1.0f)), broadcast(8.0f)), last = broadcast(15.0f);
    return where_less(phase, last, phase, last);
  } else {
    return mul(add(u, broadcast(0.5f)), broadcast(16.0f));
  }
}

}  // namespace commrt::COMMRT_RULES
