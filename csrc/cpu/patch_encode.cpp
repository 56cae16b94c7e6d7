#include <cstring>

#include "patch_lanes.h"
#include "patch_piece.h"

namespace commrt::COMMRT_ISA {
namespace {

template <typename Word>
COMMRT_INLINE int body_bytes(const Changes<Word>& changes) {
  return kPatchMaskBytes + code_region_bytes(changes.num_changed) +
         padded_bytes(changes.num_escaped * static_cast<int>(sizeof(Word)));
}

// False where the body would not be shorter than `raw_bytes`; the changes then are not complete.
template <typename Word>
COMMRT_INLINE bool find_changes(const Word* after, const Word* before, int raw_bytes,
                                Changes<Word>& changes) {
  changes.num_changed = changes.num_escaped = 0;
  for (int i = 0; i < kPatchGroup; i += kPatchLanes) {
    const std::uint32_t mask = changed_lanes(after + i, before + i);
    changes.mask[i / kPatchLanes] = mask;
    if (!mask) continue;
    take_changes(after + i, before + i, mask, changes);
    if (body_bytes(changes) >= raw_bytes) return false;
  }
  return true;
}

template <typename Word>
COMMRT_INLINE void write_body(Changes<Word>& changes, std::uint8_t* to) {
  std::memcpy(to, changes.mask, kPatchMaskBytes);
  to += kPatchMaskBytes;
  const int code_bytes = code_region_bytes(changes.num_changed);
  std::memset(changes.codes + changes.num_changed, 0, 8);  // the most that is padded
  for (int i = 0; i < code_bytes; ++i) {
    to[i] = static_cast<std::uint8_t>(changes.codes[2 * i] | changes.codes[2 * i + 1] << 4);
  }
  changes.escaped[changes.num_escaped] = 0;
  std::memcpy(
      to + code_bytes, changes.escaped,
      static_cast<std::size_t>(padded_bytes(changes.num_escaped * static_cast<int>(sizeof(Word)))));
}

// `count` elements of both tensors; what a last group lacks has not changed.
template <typename Word>
COMMRT_PHASE void encode_group(const Word* after, const Word* before, int count, PatchPiece& piece,
                               int index) {
  Word padded[2][kPatchGroup];
  if (count < kPatchGroup) {
    std::memset(padded, 0, sizeof padded);
    std::memcpy(padded[0], after, sizeof(Word) * static_cast<std::size_t>(count));
    std::memcpy(padded[1], before, sizeof(Word) * static_cast<std::size_t>(count));
    after = padded[0];
    before = padded[1];
  }
  const int raw_bytes = padded_bytes(count * static_cast<int>(sizeof(Word)));
  Changes<Word> changes;
  if (!find_changes(after, before, raw_bytes, changes)) {
    piece.kind[index] = PatchKind::kRaw;
    piece.body_bytes[index] = raw_bytes;
  } else if (changes.num_changed == 0) {
    piece.kind[index] = PatchKind::kSame;
    piece.body_bytes[index] = 0;
  } else {
    piece.kind[index] = PatchKind::kPatch;
    piece.body_bytes[index] = body_bytes(changes);
    write_body(changes, piece.patches + piece.patches_bytes);
    piece.patches_bytes += piece.body_bytes[index];
  }
}

}  // namespace

void patch_encode(const PatchEncodeArgs& args, PatchPiece& piece, std::int64_t begin,
                  std::int64_t end) {
  piece.count = static_cast<int>(end - begin);
  piece.patches_bytes = 0;
  with_element_size(args.element_size, [&]<int size>() {
    using Word = Bits<size>;
    for (std::int64_t group = begin; group < end; ++group) {
      const std::int64_t first = group * kPatchGroup, left = args.numel - first;
      encode_group(static_cast<const Word*>(args.after) + first,
                   static_cast<const Word*>(args.before) + first,
                   static_cast<int>(left < kPatchGroup ? left : kPatchGroup), piece,
                   static_cast<int>(group - begin));
    }
  });
}

}  // namespace commrt::COMMRT_ISA
