#include <cstring>

#include "../math/patch.h"
#include "../ops.h"
#include "simd.h"

namespace commrt::COMMRT_ISA {
namespace {

constexpr int kMaskWords = kPatchMaskBytes / 4;

// A patch's body, once it is known to lie within `left` bytes.
struct Body {
  std::uint32_t mask[kMaskWords];
  const std::uint8_t *codes, *escaped;

  // False if it does not, or names elements behind the first `count`.
  bool read(const std::uint8_t* from, std::int64_t left, int count, int size) {
    if (left < kPatchMaskBytes) return false;
    std::memcpy(mask, from, kPatchMaskBytes);
    int num_changed = 0;
    for (int i = 0; i < kMaskWords; ++i) {
      const int valid = count - 32 * i;
      if (valid < 32 && (valid <= 0 ? mask[i] : mask[i] >> valid)) return false;
      num_changed += __builtin_popcount(mask[i]);
    }
    codes = from + kPatchMaskBytes;
    const int code_bytes = code_region_bytes(num_changed);
    if (left < kPatchMaskBytes + code_bytes) return false;
    escaped = codes + code_bytes;
    int num_escaped = 0;
    for (int i = 0; i < code_bytes; i += 4) {
      std::uint32_t eight;
      std::memcpy(&eight, codes + i, 4);
      num_escaped += __builtin_popcount(escapes_among(eight));
    }
    return left >= kPatchMaskBytes + code_bytes + num_escaped * size;
  }
};

template <typename Word>
COMMRT_INLINE void patch(const Body& body, Word* weights) {
  const std::uint8_t* escaped = body.escaped;
  int position = 0;
  for (int word = 0; word < kMaskWords; ++word) {
    for (std::uint32_t mask = body.mask[word]; mask; mask &= mask - 1, ++position) {
      Word& weight = weights[32 * word + __builtin_ctz(mask)];
      const unsigned code = body.codes[position / 2] >> 4 * (position % 2) & 15u;
      if (code != kEscape) {
        weight = changed(weight, code);
      } else {
        std::memcpy(&weight, escaped, sizeof weight);
        escaped += sizeof weight;
      }
    }
  }
}

// False, and nothing done, if the group's body is not what an encoder can have written.
template <typename Word>
COMMRT_PHASE bool apply_group(const PatchApplyArgs& args, std::int64_t group, std::int64_t total) {
  std::uint32_t entry;
  std::memcpy(&entry, args.payload + kPatchTotalBytes + 4 * group, 4);
  const std::int64_t first = group * kPatchGroup, left = args.numel - first;
  const int count = static_cast<int>(left < kPatchGroup ? left : kPatchGroup);
  const std::int64_t offset = entry_offset(entry);
  const std::uint8_t* from = args.payload + offset;
  Word* weights = static_cast<Word*>(args.weights) + first;
  if (entry_kind(entry) == PatchKind::kSame) return true;
  if (offset < patch_header_bytes(args.numel) || offset > total) return false;
  if (entry_kind(entry) == PatchKind::kRaw) {
    const auto num_bytes = count * static_cast<std::int64_t>(sizeof(Word));
    if (total - offset < num_bytes) return false;
    std::memcpy(weights, from, static_cast<std::size_t>(num_bytes));
    return true;
  }
  Body body;
  const bool is_whole = entry_kind(entry) == PatchKind::kPatch &&
                        body.read(from, total - offset, count, static_cast<int>(sizeof(Word)));
  if (is_whole) patch(body, weights);
  return is_whole;
}

}  // namespace

bool patch_apply(const PatchApplyArgs& args, std::int64_t begin, std::int64_t end) {
  std::int64_t total;
  std::memcpy(&total, args.payload, kPatchTotalBytes);
  if (total < patch_header_bytes(args.numel) || total > args.payload_bytes) return false;
  return with_element_size(args.element_size, [&]<int size>() {
    bool is_whole = true;
    for (std::int64_t group = begin; group < end; ++group) {
      is_whole &= apply_group<Bits<size>>(args, group, total);
    }
    return is_whole;
  });
}

}  // namespace commrt::COMMRT_ISA
