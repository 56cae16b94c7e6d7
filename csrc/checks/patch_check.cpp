// The patches' part of kernel_check: few, many and all elements changed, near and far.
#include "../cpu/patch_piece.h"
#include "../cuda/ops.h"
#include "check.h"

namespace commrt {

namespace portable {
void patch_encode(const PatchEncodeArgs&, PatchPiece&, std::int64_t, std::int64_t);
bool patch_apply(const PatchApplyArgs&, std::int64_t, std::int64_t);
}  // namespace portable

namespace {

constexpr std::int64_t kSizes[] = {1, 1023, 1024, 1025, 5000, 20001};
constexpr unsigned kPerMille[] = {0, 2, 80, 400, 1000};
using Bytes = std::vector<std::uint8_t>;

Bytes random_bits(std::int64_t count, std::mt19937& random) {
  Bytes bytes(static_cast<std::size_t>(count));
  for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(random());
  return bytes;
}

// So many of the elements changed, by their lowest byte or by another: near and far.
Bytes change(Bytes bytes, int size, unsigned per_mille, std::mt19937& random) {
  for (std::size_t i = 0; i < bytes.size(); i += static_cast<std::size_t>(size)) {
    if (random() % 1000 >= per_mille) continue;
    const bool is_far = random() % 8 == 0;
    bytes[i + (is_far ? 1 : 0)] ^= static_cast<std::uint8_t>(1 + random() % 3);
  }
  return bytes;
}

Bytes encoded(const Bytes& after, const Bytes& before, int size, std::int64_t numel) {
  Bytes payload(static_cast<std::size_t>(patch_header_bytes(numel)) + after.size() + 4);
  const PatchEncodeArgs args{after.data(), before.data(), size, numel, payload.data()};
  encode_patch(args, portable::patch_encode, [](std::int64_t groups, const auto& encode_piece) {
    for (std::int64_t begin = 0; begin < groups; begin += kPieceGroups) {
      encode_piece(begin, groups < begin + kPieceGroups ? groups : begin + kPieceGroups);
    }
  });
  std::int64_t total;
  std::memcpy(&total, payload.data(), kPatchTotalBytes);
  payload.resize(static_cast<std::size_t>(total));
  return payload;
}

}  // namespace

void check_patch_apply(Checks& checks, std::mt19937& random) {
  int index = 0;
  for (const int size : {2, 4}) {
    for (const std::int64_t numel : kSizes) {
      for (const unsigned per_mille : kPerMille) {
        ++index;
        const Bytes before = random_bits(numel * size, random);
        const Bytes after = change(before, size, per_mille, random);
        const Bytes patch = encoded(after, before, size, numel);
        const auto patch_size = static_cast<std::int64_t>(patch.size());
        Buffer weights(numel * size, index % 2 ? size : 0);
        Buffer payload(patch_size, index % 3 ? 4 : 0);
        weights.set(before.data());
        payload.set(patch.data());
        const bool is_whole = portable::patch_apply(
            {weights.cpu(), size, numel, payload.cpu(), patch_size}, 0, patch_groups(numel));
        cuda::patch_apply({weights.gpu(), size, numel, payload.gpu(), patch_size}, {});
        Buffer wanted(numel * size,
                      0);  // beside the encoder's input, so that it is checked as well
        wanted.set(after.data());
        std::memcpy(wanted.gpu(), weights.gpu(), after.size());
        if (!is_whole) wanted.cpu()[0] ^= 1;
        checks.expect("patch_apply case " + std::to_string(index), {&weights, &payload, &wanted});
      }
    }
  }
}

}  // namespace commrt
