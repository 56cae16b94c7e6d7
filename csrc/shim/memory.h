// Vectors that one instruction loads or stores, and hints to the caches, which there are none of.
#pragma once

#include <cstdint>
#include <stdexcept>

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace commrt::shim {

template <typename T>
void check_aligned(const T* address) {
  if (reinterpret_cast<std::uintptr_t>(address) % alignof(T)) {
    throw Error("misaligned address of a " + std::to_string(sizeof(T)) + "-byte access");
  }
}

}  // namespace commrt::shim

// Read once: past the first-level cache.
template <typename T>
T __ldcs(const T* from) {
  commrt::shim::check_aligned(from);
  return *from;
}

// Written once: evict first.
template <typename T>
void __stcs(T* to, T value) {
  commrt::shim::check_aligned(to);
  *to = value;
}
