#include "source_values.h"

namespace commrt::COMMRT_ISA {
namespace {

// What there is at each element itself; the largest one.
template <typename Previous, typename Own>
COMMRT_PHASE float weigh(Previous previous, Own own, float weight, std::int64_t count,
                         float* energies) {
  std::uint32_t most = 0;  // bits of positive numbers are in their order
  for (std::int64_t i = 0; i < count; ++i) {
    const float x = own[i], y = previous[i];
    const float energy = clamp_between(x * x + weight * (y * y), kLeastEnergy, kMostEnergy);
    energies[i] = energy;
    const std::uint32_t bits = float_to_bits(energy);
    most = bits > most ? bits : most;
  }
  return bits_to_float(most);
}

// 2^(kEnergyBits - e) for a number in [2^(e - 1), 2^e).
COMMRT_INLINE double unit_of(float largest) {
  const int exponent = static_cast<int>(float_to_bits(largest) >> 23) - 126;
  const auto bits = static_cast<std::uint64_t>(kEnergyBits - exponent + 1023) << 52;
  double unit;
  std::memcpy(&unit, &bits, sizeof unit);
  return unit;
}

// Of rows and columns, in this unit; the sum of all.
COMMRT_PHASE std::int64_t sum_up(const float* energies, const Matrix& matrix, double unit,
                                 const EnergySums& sums) {
  const std::int64_t cols = matrix.cols;  // which stores to the sums might change
  std::int64_t total = 0;
  std::int64_t* __restrict__ of_col = sums.of_col;
  std::memset(of_col, 0, sizeof(std::int64_t) * static_cast<std::size_t>(cols));
  for (std::int64_t row = 0; row < matrix.rows; ++row, energies += cols) {
    std::int64_t sum = 0;
    for (std::int64_t col = 0; col < cols; ++col) {
      const auto whole = static_cast<std::int64_t>(static_cast<double>(energies[col]) * unit);
      of_col[col] += whole;
      sum += whole;
    }
    sums.of_row[row] = sum;
    total += sum;
  }
  return total;
}

COMMRT_PHASE void add_products(const Matrix& matrix, double unit, std::int64_t total,
                               const EnergySums& sums, float* energies) {
  float* __restrict__ of_col = sums.col;
  for (std::int64_t col = 0; col < matrix.cols; ++col) {
    of_col[col] = static_cast<float>(sums.of_col[col]);
  }
  const auto whole = static_cast<double>(total < 1 ? 1 : total);
  for (std::int64_t row = 0; row < matrix.rows; ++row, energies += matrix.cols) {
    const auto share = static_cast<float>(static_cast<double>(sums.of_row[row]) / whole / unit);
    for (std::int64_t col = 0; col < matrix.cols; ++col) energies[col] += share * of_col[col];
  }
}

}  // namespace

void source_energies(const SourceEnergiesArgs& args, const EnergySums& sums, std::int64_t begin,
                     std::int64_t end) {
  for (std::int64_t index = begin; index < end; ++index) {
    const Matrix& matrix = args.matrices[index];
    const std::int64_t count = matrix.rows * matrix.cols;
    float* energies = args.energies + matrix.begin;
    float largest = 0.0f;
    with_values(args.previous, matrix.begin, [&](auto previous) {
      with_values(args.own, matrix.begin, [&](auto own) {
        largest = weigh(previous, own, args.previous_weight, count, energies);
      });
    });
    if (matrix.rows > 1 && matrix.cols > 1) {
      const double unit = unit_of(largest);
      add_products(matrix, unit, sum_up(energies, matrix, unit, sums), sums, energies);
    } else {
      for (std::int64_t i = 0; i < count; ++i) energies[i] *= 2.0f;
    }
  }
}

}  // namespace commrt::COMMRT_ISA
