#include "../math/polar.h"
#include "../polar.h"
#include "simd.h"

namespace commrt::COMMRT_ISA {
namespace {

// Call body(i) for the elements of tiles [begin, end).
template <typename Body>
COMMRT_INLINE void for_elements(std::int64_t numel, std::int64_t begin, std::int64_t end,
                                Body body) {
  const std::int64_t limit = end * kCosetTile < numel ? end * kCosetTile : numel;
  for (std::int64_t i = begin * kCosetTile; i < limit; ++i) body(i);
}

}  // namespace

void coset_llr(const CosetLlrArgs& args, std::int64_t begin, std::int64_t end) {
  for_elements(args.numel, begin, end, [args](std::int64_t i) COMMRT_INLINE_LAMBDA {
    args.llr[i] = llr_in_coset(args.position[i], args.known[i], args.inverse_place, args.table,
                               args.table_size);
  });
}

void coset_decode(const CosetDecodeArgs& args, std::int64_t begin, std::int64_t end) {
  for_elements(args.numel, begin, end, [args](std::int64_t i) COMMRT_INLINE_LAMBDA {
    args.codes[i] =
        nearest_in_coset(args.position[i], args.residues[i], args.modulus, args.inverse_modulus);
  });
}

}  // namespace commrt::COMMRT_ISA
