// The part of kernel_check that polar codes and cosets have.
#include "../cuda/polar.h"
#include "check.h"

namespace commrt {

namespace portable {
void polar_transform(const PolarTransformArgs&, std::int64_t, std::int64_t);
void polar_decode(const PolarDecodeArgs&, std::int64_t, std::int64_t);
void coset_llr(const CosetLlrArgs&, std::int64_t, std::int64_t);
void coset_decode(const CosetDecodeArgs&, std::int64_t, std::int64_t);
}  // namespace portable

namespace {

constexpr std::int64_t kSizes[] = {1, 255, 256, 257, 1024, 1025, 5000, 20001};

template <typename T>
std::vector<T> random_bits(std::int64_t count, std::mt19937& random) {
  std::vector<T> values(static_cast<std::size_t>(count));
  for (T& value : values) value = static_cast<T>(random());
  return values;
}

// Numbers of an ordinary size, and now and then one that is not finite.
std::vector<float> random_floats(std::int64_t count, float spread, std::mt19937& random) {
  std::vector<float> values(static_cast<std::size_t>(count));
  std::normal_distribution<float> normal(0.0f, spread);
  constexpr float kOthers[] = {NAN, INFINITY, -INFINITY, -0.0f, 1e-42f, 3e38f};
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = i % 61 == 7 ? kOthers[i % 6] : normal(random);
  }
  return values;
}

// By nodes, but for the first bits, which are drawn one by one.
std::vector<std::uint8_t> random_known(std::int64_t size, std::int64_t node, std::mt19937& random) {
  std::vector<std::uint8_t> known(static_cast<std::size_t>(size));
  std::uint8_t last = 0;
  for (std::size_t i = 0; i < known.size(); ++i) {
    if (i < 20 || i % static_cast<std::size_t>(node) == 0) last = random() % 3 != 0 ? 0xF0 : 0;
    known[i] = last;
  }
  return known;
}

void check_decode_case(std::int64_t num_blocks, int log2_size, int paths, int shift, Checks& checks,
                       std::mt19937& random) {
  const bool is_shared = num_blocks % 2 == 0;
  const std::int64_t size = std::int64_t{1} << log2_size, all = num_blocks * size;
  const std::int64_t scratch_bytes = 4 * num_blocks * polar_scratch(log2_size, paths);
  Buffer llr(4 * all, 4 * shift), known(is_shared ? size : all, shift);
  Buffer values(all, shift), bits(all, shift), scratch(scratch_bytes, 4 * shift);
  llr.set(random_floats(all, 4.0f, random).data());
  known.set(random_known(is_shared ? size : all, size / 16, random).data());
  values.set(random_bits<std::uint8_t>(all, random).data());
  const auto args = [&](auto place) {
    return PolarDecodeArgs{reinterpret_cast<const float*>(place(llr)),
                           place(known),
                           is_shared ? 0 : size,
                           place(values),
                           place(bits),
                           reinterpret_cast<float*>(place(scratch)),
                           num_blocks,
                           log2_size,
                           paths};
  };
  portable::polar_decode(args([](Buffer& buffer) { return buffer.cpu(); }), 0, num_blocks);
  cuda::polar_decode(args([](Buffer& buffer) { return buffer.gpu(); }), {});
  checks.expect(
      "polar_decode of 2^" + std::to_string(log2_size) + " bits, paths " + std::to_string(paths),
      {&llr, &known, &values, &bits});
}

}  // namespace

void check_polar_transform(Checks& checks, std::mt19937& random) {
  for (int index = 0; index < 48; ++index) {
    const int log2_size = index < 45 ? 8 + index % 4 : 16;
    const std::int64_t num_blocks = 1 + index % 3;
    Buffer bits(num_blocks << log2_size, index % 5);
    bits.set(random_bits<std::uint8_t>(num_blocks << log2_size, random).data());
    portable::polar_transform({bits.cpu(), num_blocks, log2_size}, 0, num_blocks);
    cuda::polar_transform({bits.gpu(), num_blocks, log2_size}, {});
    checks.expect("polar_transform case " + std::to_string(index), {&bits});
  }
}

// Large blocks have LLRs that are not in the shared memory.
void check_polar_decode(Checks& checks, std::mt19937& random) {
  int large = 13;
  for (const int paths : {1, 2, 4, 8}) {
    for (int index = 0; index < 12; ++index) {
      const int num_blocks = index % 4 == 0 ? 2 : 1;
      check_decode_case(num_blocks, 8 + index % 2, paths, index / 2 % 2, checks, random);
    }
    check_decode_case(1, large--, paths, 1, checks, random);
  }
}

void check_coset_llr(Checks& checks, std::mt19937& random) {
  for (const std::int64_t numel : kSizes) {
    for (const int table_size : {2, 256, 4096}) {
      for (const int plane : {0, 3}) {
        Buffer position(4 * numel, 4), known(2 * numel, 2), table(4 * table_size, 0);
        Buffer llr(4 * numel, 4);
        position.set(random_floats(numel, 50.0f, random).data());
        known.set(random_bits<std::int16_t>(numel, random).data());
        table.set(random_floats(table_size, 3.0f, random).data());
        const auto args = [&](auto place) {
          return CosetLlrArgs{reinterpret_cast<const float*>(place(position)),
                              reinterpret_cast<const std::int16_t*>(place(known)),
                              1.0f / static_cast<float>(1 << plane),
                              reinterpret_cast<const float*>(place(table)),
                              table_size,
                              reinterpret_cast<float*>(place(llr)),
                              numel};
        };
        portable::coset_llr(args([](Buffer& buffer) { return buffer.cpu(); }), 0,
                            (numel + kCosetTile - 1) / kCosetTile);
        cuda::coset_llr(args([](Buffer& buffer) { return buffer.gpu(); }), {});
        checks.expect("coset_llr of " + std::to_string(numel), {&position, &known, &table, &llr});
      }
    }
  }
}

void check_coset_decode(Checks& checks, std::mt19937& random) {
  for (const std::int64_t numel : kSizes) {
    for (const int modulus : {1, 2, 3, 16, 1000, 32768}) {
      Buffer position(4 * numel, 4), residues(2 * numel, 2), codes(2 * numel, 2);
      position.set(random_floats(numel, 5000.0f, random).data());
      residues.set(random_bits<std::int16_t>(numel, random).data());
      const auto args = [&](auto place) {
        return CosetDecodeArgs{reinterpret_cast<const float*>(place(position)),
                               reinterpret_cast<const std::int16_t*>(place(residues)),
                               static_cast<float>(modulus),
                               1.0f / static_cast<float>(modulus),
                               reinterpret_cast<std::int16_t*>(place(codes)),
                               numel};
      };
      portable::coset_decode(args([](Buffer& buffer) { return buffer.cpu(); }), 0,
                             (numel + kCosetTile - 1) / kCosetTile);
      cuda::coset_decode(args([](Buffer& buffer) { return buffer.gpu(); }), {});
      checks.expect("coset_decode of " + std::to_string(numel), {&position, &residues, &codes});
    }
  }
}

}  // namespace commrt
