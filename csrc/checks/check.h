// What the checks of the kernels share.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace commrt {

constexpr std::uint64_t kFirstIndex = (1ULL << 40) + 4096;  // past the low word of a counter
constexpr std::uint64_t kSeed = 0x123456789abcdefULL;

// Heap memory of an exact size, `shift` bytes behind an aligned address, beside a copy that is aligned.
class Buffer {
 public:
  Buffer(std::int64_t num_bytes, int shift)
      : bytes_(static_cast<std::size_t>(num_bytes)),
        shift_(static_cast<std::size_t>(shift)),
        memory_(std::malloc(bytes_ + shift_)),
        copy_(bytes_ + 1) {
    std::memset(gpu(), 0xA5, bytes_);
    std::memset(copy_.data(), 0xA5, copy_.size());
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(memory_); }

  std::uint8_t* gpu() { return static_cast<std::uint8_t*>(memory_) + shift_; }
  std::uint8_t* cpu() { return copy_.data(); }
  void set(const void* from) {
    std::memcpy(gpu(), from, bytes_);
    std::memcpy(cpu(), from, bytes_);
  }
  bool is_same() { return std::memcmp(gpu(), cpu(), bytes_) == 0; }

 private:
  std::size_t bytes_, shift_;
  void* memory_;
  std::vector<std::uint8_t> copy_;
};

class Checks {
 public:
  // One case: both kernels have run, and every buffer must be the same.
  void expect(const std::string& name, const std::vector<Buffer*>& buffers) {
    ++cases_;
    for (std::size_t i = 0; i < buffers.size(); ++i) {
      if (buffers[i]->is_same()) continue;
      std::printf("DIFFERENT: %s, buffer %zu\n", name.c_str(), i);
      ++failures_;
    }
  }
  void report(const char* op) {
    std::printf("%s: %d cases\n", op, cases_);
    cases_ = 0;
  }
  int failures() const { return failures_; }

 private:
  int cases_ = 0, failures_ = 0;
};

// In dither_check.cpp.
void check_dither_quantise(Checks& checks, std::mt19937& random);
void check_dither_dequantise(Checks& checks, std::mt19937& random);
void check_scale_rows(Checks& checks, std::mt19937& random);
void check_lmmse_combine(Checks& checks, std::mt19937& random);

// In patch_check.cpp.
void check_patch_apply(Checks& checks, std::mt19937& random);

// In rans_check.cpp.
void check_rans_encode(Checks& checks, std::mt19937& random);
void check_rans_decode(Checks& checks, std::mt19937& random);

// In polar_check.cpp.
void check_polar_transform(Checks& checks, std::mt19937& random);
void check_polar_decode(Checks& checks, std::mt19937& random);
void check_coset_llr(Checks& checks, std::mt19937& random);
void check_coset_decode(Checks& checks, std::mt19937& random);

// In source_check.cpp.
void check_source_energies(Checks& checks, std::mt19937& random);
void check_source_prediction(Checks& checks, std::mt19937& random);
void check_source_products(Checks& checks, std::mt19937& random);
void check_source_history(Checks& checks, std::mt19937& random);
void check_update_add(Checks& checks, std::mt19937& random);

// In step_check.cpp.
void check_adam_mini(Checks& checks, std::mt19937& random);
void check_adamw(Checks& checks, std::mt19937& random);
void check_adan(Checks& checks, std::mt19937& random);
void check_lion(Checks& checks, std::mt19937& random);
void check_mofo(Checks& checks, std::mt19937& random);
void check_square_sums(Checks& checks, std::mt19937& random);

}  // namespace commrt
