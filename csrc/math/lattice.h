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

// Twice the nearest point of E8; commrt/ops/reference/dither.py says why it is. NaN in any coordinate
// is NaN in all.
COMMRT_RULE void nearest_e8(const V (&x)[8], V (&twice)[8]) {
  const V zero = broadcast(0.0f), one = broadcast(1.0f);
  V side[8], sum = zero, sides = zero, saved = zero;
  V most = broadcast(-1.0f), least = one, at_most = zero, at_least = zero;
  for (int i = 0; i < 8; ++i) {
    const V integer = round_even(x[i]), offset = sub(x[i], integer), distance = magnitude(offset);
    const V place = broadcast(static_cast<float>(i));
    side[i] = where_less(offset, zero, broadcast(-1.0f), one);
    twice[i] = add(integer, integer);
    sum = add(sum, integer);
    sides = add(sides, side[i]);
    saved = add(saved, sub(distance, broadcast(0.25f)));
    at_most = where_less(most, distance, place, at_most);
    most = where_less(most, distance, distance, most);
    at_least = where_less(distance, least, place, at_least);
    least = where_less(distance, least, distance, least);
  }
  // Half of the sides is four more than what rounding to halves adds to the sum.
  const V is_odd = odd(sum), is_odd_half = odd(add(sum, mul(sides, broadcast(0.5f))));
  const V cost = mul(is_odd, sub(one, add(most, most)));
  const V half_cost = sub(mul(is_odd_half, add(least, least)), saved);
  const V nowhere = broadcast(8.0f), half = broadcast(0.5f);
  const V at = where_less(half_cost, cost, where_less(half, is_odd_half, at_least, nowhere),
                          where_less(half, is_odd, at_most, nowhere));
  const V nothing = mul(saved, zero);  // or NaN
  const V unmoved = add(nothing, where_less(half_cost, cost, one, zero));
  const V moved = add(nothing, where_less(half_cost, cost, broadcast(-1.0f), broadcast(2.0f)));
  for (int i = 0; i < 8; ++i) {
    const V sides_away = where_equal(at, broadcast(static_cast<float>(i)), moved, unmoved);
    twice[i] = add(twice[i], mul(side[i], sides_away));
  }
}

// From uniform numbers to the dither.
template <Lattice lattice>
COMMRT_RULE void to_dither(V (&u)[kCell<lattice>]) {
  if constexpr (lattice == Lattice::kE8) {
    V twice[8];
    for (V& z : u) z = add(z, z);
    nearest_e8(u, twice);
    for (int i = 0; i < 8; ++i) u[i] = sub(u[i], mul(twice[i], broadcast(0.5f)));
  } else {
    u[0] = sub(u[0], broadcast(0.5f));
  }
}

// From dithered values, in steps and within the limit, to codes; those of kZ still to be rounded.
template <Lattice lattice>
COMMRT_RULE void to_codes(V (&x)[kCell<lattice>]) {
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
