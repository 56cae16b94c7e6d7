// The dither's part of kernel_check: windows that begin and end anywhere, at any address.
#include <algorithm>
#include <cmath>

#include "../cuda/dither.h"
#include "check.h"

namespace commrt {

namespace portable {
void dither_quantise(const DitherQuantiseArgs&, std::int64_t, std::int64_t);
void dither_dequantise(const DitherDequantiseArgs&, std::int64_t, std::int64_t);
void scale_rows(const ScaleRowsArgs&, std::int64_t, std::int64_t);
void lmmse_combine(const LmmseCombineArgs&, std::int64_t, std::int64_t);
}  // namespace portable

namespace {

// In points of the lattice.
constexpr std::int64_t kSizes[] = {1, 5, 8, 17, 256, 1024, 2309};

struct Case {
  Dither dither;
  std::int64_t numel;
  bool has_first, has_second;  // of the inputs that may be null
  int index;

  std::string name(const char* op) const {
    return std::string(op) + (dither.lattice == Lattice::kE8 ? " e8" : " z") + " numel " +
           std::to_string(numel) + " / " + std::to_string(index);
  }
  // Aligned to a vector, or by one element only.
  int shift(int size) const { return index % 2 ? size : 0; }
  std::int64_t tiles() const { return (numel + kDitherTile - 1) / kDitherTile; }
};

template <typename Body>
void for_each_case(Body body) {
  int index = 0;
  for (const Lattice lattice : {Lattice::kZ, Lattice::kE8}) {
    const std::int64_t dimension = lattice == Lattice::kE8 ? 8 : 1;
    for (const std::int64_t size : kSizes) {
      for (const std::uint64_t first : {kFirstIndex, kFirstIndex + 8, kFirstIndex + 13}) {
        for (const int given : {0, 1, 2, 3}) {
          const std::uint64_t first_index = first / dimension * dimension;
          body(Case{
              {lattice, kSeed, first_index}, size * dimension, given % 2 == 1, given > 1, index++});
        }
      }
    }
  }
}

// Steps of one and more, ties, and what a quantizer has to clamp; NaN where `has_nan`.
std::vector<float> random_values(std::int64_t numel, std::mt19937& random, bool has_nan) {
  std::vector<float> values(static_cast<std::size_t>(numel));
  std::normal_distribution<float> normal(0.0f, 3.0f);
  for (float& x : values) {
    x = normal(random);
    if (random() % 4 == 0) x = std::round(2 * x) / 2;
    if (random() % 50 == 0) x = random() % 2 ? 1e9f : -INFINITY;
    if (random() % 50 == 0 && has_nan) x = NAN;
  }
  return values;
}

std::vector<std::int16_t> random_codes(std::int64_t numel, std::mt19937& random) {
  std::vector<std::int16_t> codes(static_cast<std::size_t>(numel));
  for (std::int16_t& code : codes) {
    code = random() % 9 ? static_cast<std::int16_t>(random()) : kNanCode;
  }
  return codes;
}

// Of groups, which may have no elements; not of the last, which has what is left.
std::vector<std::int64_t> random_ends(std::int64_t numel, int count, std::mt19937& random) {
  std::vector<std::int64_t> ends(static_cast<std::size_t>(count));
  for (std::int64_t& end : ends) {
    end = static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(numel + 1));
  }
  std::sort(ends.begin(), ends.end());
  return ends;
}

template <typename T>
T* or_null(bool is_given, std::uint8_t* memory) {
  return is_given ? reinterpret_cast<T*>(memory) : nullptr;
}

}  // namespace

void check_dither_quantise(Checks& checks, std::mt19937& random) {
  for_each_case([&](const Case& c) {
    Buffer values(4 * c.numel, c.shift(4)), predicted(4 * c.numel, 0);
    Buffer codes(2 * c.numel, c.shift(2));
    values.set(random_values(c.numel, random, true).data());
    predicted.set(random_values(c.numel, random, true).data());
    const auto args = [&](std::uint8_t* from, std::uint8_t* guess, std::uint8_t* to) {
      return DitherQuantiseArgs{reinterpret_cast<const float*>(from),
                                or_null<const float>(c.has_first, guess),
                                reinterpret_cast<std::int16_t*>(to),
                                c.numel,
                                0.3f,
                                c.dither};
    };
    portable::dither_quantise(args(values.cpu(), predicted.cpu(), codes.cpu()), 0, c.tiles());
    cuda::dither_quantise(args(values.gpu(), predicted.gpu(), codes.gpu()), {});
    checks.expect(c.name("dither_quantise"), {&values, &predicted, &codes});
  });
}

// Without a NaN that is predicted: which one comes of it, is not said.
void check_dither_dequantise(Checks& checks, std::mt19937& random) {
  for_each_case([&](const Case& c) {
    Buffer codes(2 * c.numel, c.shift(2)), predicted(4 * c.numel, 0);
    Buffer values(4 * c.numel, c.shift(4));
    codes.set(random_codes(c.numel, random).data());
    predicted.set(random_values(c.numel, random, false).data());
    const auto args = [&](std::uint8_t* from, std::uint8_t* guess, std::uint8_t* to) {
      return DitherDequantiseArgs{reinterpret_cast<const std::int16_t*>(from),
                                  or_null<const float>(c.has_first, guess),
                                  reinterpret_cast<float*>(to),
                                  c.numel,
                                  0.3f,
                                  c.dither};
    };
    portable::dither_dequantise(args(codes.cpu(), predicted.cpu(), values.cpu()), 0, c.tiles());
    cuda::dither_dequantise(args(codes.gpu(), predicted.gpu(), values.gpu()), {});
    checks.expect(c.name("dither_dequantise"), {&codes, &predicted, &values});
  });
}

void check_scale_rows(Checks& checks, std::mt19937& random) {
  for_each_case([&](const Case& c) {
    const int num_classes = 1 + c.index % kMaxClasses, num_groups = 1 + c.index % 3;
    Buffer energies(4 * c.numel, c.shift(4)), classes(2 * num_classes * num_groups, 2);
    Buffer ends(8 * num_groups, 8), contexts(2 * c.numel, 0), rows(2 * c.numel, c.shift(2));
    energies.set(random_values(c.numel, random, true).data());
    classes.set(random_codes(num_classes * num_groups, random).data());
    ends.set(random_ends(c.numel, num_groups, random).data());
    const auto args = [&](const auto& place) {
      return ScaleRowsArgs{or_null<const float>(c.has_first, place(energies)),
                           reinterpret_cast<const std::int16_t*>(place(classes)),
                           num_classes,
                           {reinterpret_cast<const std::int64_t*>(place(ends)), num_groups},
                           220,
                           or_null<std::int16_t>(c.has_second, place(contexts)),
                           reinterpret_cast<std::int16_t*>(place(rows)),
                           c.numel,
                           c.dither};
    };
    portable::scale_rows(args([](Buffer& buffer) { return buffer.cpu(); }), 0, c.tiles());
    cuda::scale_rows(args([](Buffer& buffer) { return buffer.gpu(); }), {});
    checks.expect(c.name("scale_rows"), {&energies, &classes, &ends, &contexts, &rows});
  });
}

void check_lmmse_combine(Checks& checks, std::mt19937& random) {
  int index = 0;
  for (const int count : {1, 2, 7, 8, 19}) {
    for (const std::int64_t numel : kSizes) {
      for (const std::int64_t between : {0, 3}) {
        const int shift = ++index % 2 ? 4 : 0;
        const std::int64_t stride = numel + between, total = stride * (count - 1) + numel;
        Buffer stack(4 * total, shift), weights(4 * count, 4), out(4 * numel, shift);
        stack.set(random_values(total, random, false).data());
        weights.set(random_values(count, random, false).data());
        const auto args = [&](std::uint8_t* from, std::uint8_t* by, std::uint8_t* to) {
          return LmmseCombineArgs{reinterpret_cast<const float*>(from),
                                  stride,
                                  count,
                                  reinterpret_cast<const float*>(by),
                                  reinterpret_cast<float*>(to),
                                  numel};
        };
        portable::lmmse_combine(args(stack.cpu(), weights.cpu(), out.cpu()), 0,
                                (numel + kDitherTile - 1) / kDitherTile);
        cuda::lmmse_combine(args(stack.gpu(), weights.gpu(), out.gpu()), {});
        checks.expect("lmmse_combine case " + std::to_string(index), {&stack, &weights, &out});
      }
    }
  }
}

}  // namespace commrt
