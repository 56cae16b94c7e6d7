// A patch's groups on their way into the payload. How long a body is, is known only when it is
// there: so a piece is encoded beside the payload, and goes into it when those before it have.
#pragma once

#include <atomic>
#include <cstring>
#include <thread>

#include "../math/patch.h"
#include "../ops.h"

namespace commrt {

constexpr int kPieceGroups = 16;  // so that both tensors' part stays in the second-level cache

struct PatchPiece {
  int count;
  PatchKind kind[kPieceGroups];
  int body_bytes[kPieceGroups];
  int patches_bytes;  // what `patches` has, the bodies of that kind one after the other
  std::uint8_t patches[kPieceGroups * kPatchGroup * 4];
};

// Hands out places in the payload in the order of the pieces, whichever thread is ready first.
class PatchPlaces {
 public:
  explicit PatchPlaces(std::int64_t header_bytes) : used_(header_bytes) {}

  // Where [begin, end) goes. Waits for the pieces before, which threads have that do not wait for it.
  std::int64_t take(std::int64_t begin, std::int64_t end, std::int64_t num_bytes) {
    while (next_.load(std::memory_order_acquire) != begin) std::this_thread::yield();
    const std::int64_t place = used_;
    used_ += num_bytes;
    next_.store(end, std::memory_order_release);
    return place;
  }
  std::int64_t used() const { return used_; }

 private:
  std::atomic<std::int64_t> next_{0};
  std::int64_t used_;
};

COMMRT_HOST std::int64_t piece_bytes(const PatchPiece& piece) {
  std::int64_t total = 0;
  for (int i = 0; i < piece.count; ++i) total += piece.body_bytes[i];
  return total;
}

// Bodies to `place` in the payload, entries to its header.
COMMRT_HOST void put_piece(const PatchEncodeArgs& args, const PatchPiece& piece, std::int64_t first,
                           std::int64_t place) {
  const std::uint8_t* patch = piece.patches;
  for (int i = 0; i < piece.count; ++i) {
    const std::int64_t group = first + i, element = group * kPatchGroup;
    const bool is_same = piece.kind[i] == PatchKind::kSame;
    const std::uint32_t entry = patch_entry(is_same ? 0 : place, piece.kind[i]);
    std::memcpy(args.payload + kPatchTotalBytes + 4 * group, &entry, 4);
    const auto num_bytes = static_cast<std::size_t>(piece.body_bytes[i]);
    std::uint8_t* to = args.payload + place;
    if (piece.kind[i] == PatchKind::kPatch) {
      std::memcpy(to, patch, num_bytes);
      patch += num_bytes;
    } else if (piece.kind[i] == PatchKind::kRaw) {
      const std::int64_t left = (args.numel - element) * args.element_size;
      const auto real = left < piece.body_bytes[i] ? static_cast<std::size_t>(left) : num_bytes;
      const auto* from = static_cast<const std::uint8_t*>(args.after) + element * args.element_size;
      std::memcpy(to, from, real);
      std::memset(to + real, 0, num_bytes - real);
    }
    place += piece.body_bytes[i];
  }
}

// By a kernel that encodes a piece. `spread` calls its argument for pieces in their order.
template <typename Kernel, typename Spread>
void encode_patch(const PatchEncodeArgs& args, Kernel kernel, Spread spread) {
  PatchPlaces places(patch_header_bytes(args.numel));
  spread(patch_groups(args.numel), [&](std::int64_t begin, std::int64_t end) {
    PatchPiece piece;
    kernel(args, piece, begin, end);
    put_piece(args, piece, begin, places.take(begin, end, piece_bytes(piece)));
  });
  const std::int64_t total = places.used();
  std::memcpy(args.payload, &total, kPatchTotalBytes);
}

}  // namespace commrt
