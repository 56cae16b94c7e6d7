#include <cstring>

#include "source_values.h"

namespace commrt::COMMRT_ISA {
namespace {

COMMRT_INLINE float share_of(const SourceHistoryArgs& args, std::int64_t i) {
  return args.shares[args.rows[i] >> 4 & (args.num_shares - 1)];
}

COMMRT_PHASE void keep(const SourceHistoryArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i) {
    const float predicted = args.predicted[i];
    args.kept[i] = float_to_bf16((args.decoded[i] - predicted) * share_of(args, i) + predicted);
  }
}

#if defined(COMMRT_USE_AVX512)

constexpr int kRegisterShares = 64;

// So few shares are in registers, which takes a quarter of the time; the end of what is done.
COMMRT_PHASE std::int64_t keep_vectors(const SourceHistoryArgs& args, std::int64_t begin,
                                       std::int64_t end) {
  if (args.num_shares > kRegisterShares) return begin;
  alignas(64) float shares[kRegisterShares];
  for (int k = 0; k < kRegisterShares; ++k) shares[k] = args.shares[k & (args.num_shares - 1)];
  const Vf a = _mm512_load_ps(shares), b = _mm512_load_ps(shares + 16);
  const Vf c = _mm512_load_ps(shares + 32), d = _mm512_load_ps(shares + 48);
  for (; begin + kLanes <= end; begin += kLanes) {
    const auto* rows = reinterpret_cast<const __m256i*>(args.rows + begin);
    const Vu place = _mm512_srli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(rows)), 4);
    const __mmask16 is_upper = _mm512_test_epi32_mask(place, _mm512_set1_epi32(32));
    const Vf share = _mm512_mask_blend_ps(is_upper, _mm512_permutex2var_ps(a, place, b),
                                          _mm512_permutex2var_ps(c, place, d));
    const Vf predicted = load<DType::kFloat32>(args.predicted + begin);
    const Vf difference = sub(load<DType::kFloat32>(args.decoded + begin), predicted);
    store<DType::kBFloat16>(args.kept + begin, add(mul(difference, share), predicted));
  }
  return begin;
}

#else

COMMRT_INLINE std::int64_t keep_vectors(const SourceHistoryArgs&, std::int64_t begin,
                                        std::int64_t) {
  return begin;
}

#endif

}  // namespace

void source_history(const SourceHistoryArgs& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t last = end * kSourceTile < args.numel ? end * kSourceTile : args.numel;
  keep(args, keep_vectors(args, begin * kSourceTile, last), last);
}

}  // namespace commrt::COMMRT_ISA
