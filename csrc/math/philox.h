// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): random
// numbers addressed by (seed, stream, element index), the same for any thread, device or layout.
#pragma once

#include "float_bits.h"

namespace commrt {

constexpr std::uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr std::uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr std::uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr std::uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// What a number is drawn for; keeps the draws for codes and for the residual independent.
enum class Stream : std::uint32_t {
  kCodes = 0,
  kResidual = 1,
  kMoment = 2,
  kWeights = 3,
  kDither = 4,
};

struct Philox4 {
  std::uint32_t word[4];
};

// Four words; element i of a tensor uses word[i % 4] of counter i / 4.
COMMRT_HD Philox4 philox(std::uint64_t seed, Stream stream, std::uint64_t counter) {
  Philox4 x = {{static_cast<std::uint32_t>(counter), static_cast<std::uint32_t>(counter >> 32),
                static_cast<std::uint32_t>(stream), 0u}};
  std::uint32_t key0 = static_cast<std::uint32_t>(seed);
  std::uint32_t key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const std::uint64_t product0 = static_cast<std::uint64_t>(kPhiloxMultiplier0) * x.word[0];
    const std::uint64_t product1 = static_cast<std::uint64_t>(kPhiloxMultiplier1) * x.word[2];
    x = {{static_cast<std::uint32_t>(product1 >> 32) ^ x.word[1] ^ key0,
          static_cast<std::uint32_t>(product1),
          static_cast<std::uint32_t>(product0 >> 32) ^ x.word[3] ^ key1,
          static_cast<std::uint32_t>(product0)}};
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return x;
}

// Uniform on [0, 1), a multiple of 2^-24.
COMMRT_HD float uniform_from_word(std::uint32_t word) {
  return static_cast<float>(word >> 8) * 5.9604644775390625e-08f;
}

}  // namespace commrt
