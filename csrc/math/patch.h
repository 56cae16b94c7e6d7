// How one element's bits became others, and where a patch keeps that. The layout is told in
// commrt/ops/patches.py.
#pragma once

#include <type_traits>

#include "float_bits.h"

namespace commrt {

constexpr int kPatchGroup = 1024;  // elements
constexpr int kPatchMaskBytes = kPatchGroup / 8;
constexpr int kPatchTotalBytes = 8;  // of the header's first word
constexpr unsigned kEscape = 15;

enum class PatchKind : std::uint32_t { kSame = 0, kPatch = 1, kRaw = 2 };

// Bits of an element of so many bytes.
template <int size>
using Bits = std::conditional_t<size == 4, std::uint32_t, std::uint16_t>;

COMMRT_HD std::int64_t patch_groups(std::int64_t numel) {
  return (numel + kPatchGroup - 1) / kPatchGroup;
}
COMMRT_HD std::int64_t patch_header_bytes(std::int64_t numel) {
  return kPatchTotalBytes + 4 * patch_groups(numel);
}
COMMRT_HD constexpr int padded_bytes(int num_bytes) { return (num_bytes + 3) / 4 * 4; }
COMMRT_HD int code_region_bytes(int num_changed) { return padded_bytes((num_changed + 1) / 2); }

// A group's entry in the header: the byte where its body begins, a multiple of four, and its kind.
COMMRT_HD std::uint32_t patch_entry(std::int64_t offset, PatchKind kind) {
  return static_cast<std::uint32_t>(offset) | static_cast<std::uint32_t>(kind);
}
COMMRT_HD PatchKind entry_kind(std::uint32_t entry) { return static_cast<PatchKind>(entry & 3); }
COMMRT_HD std::int64_t entry_offset(std::uint32_t entry) { return entry & ~3u; }

// The bits as an integer that grows with the number they mean; its own inverse.
template <typename Word>
COMMRT_HD Word ordered(Word bits) {
  constexpr auto kSign = static_cast<Word>(Word{1} << (8 * sizeof(Word) - 1));
  return static_cast<Word>(bits & kSign ? bits ^ (kSign - 1) : bits);
}

// Steps from one number to another: +-1 is a neighbour. kEscape is all that is far away, and no step.
template <typename Word>
COMMRT_HD unsigned change_code(Word after, Word before) {
  const auto steps = static_cast<Word>(ordered(after) - ordered(before));
  const bool is_down = steps >> (8 * sizeof(Word) - 1);
  const auto zigzag = static_cast<Word>(is_down ? ~(steps << 1) : steps << 1);
  const auto code = static_cast<Word>(zigzag - 1);
  return code < kEscape ? code : kEscape;
}

template <typename Word>
COMMRT_HD Word changed(Word before, unsigned code) {
  const unsigned half = (code + 1) >> 1;
  const unsigned steps = (code + 1) & 1 ? ~half : half;
  return ordered(static_cast<Word>(ordered(before) + steps));
}

// A bit for each of eight codes, four bits apart, that is kEscape.
COMMRT_HD std::uint32_t escapes_among(std::uint32_t codes) {
  const std::uint32_t pairs = codes & codes >> 1;
  return pairs & pairs >> 2 & 0x11111111u;
}

}  // namespace commrt
