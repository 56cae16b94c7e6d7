// Nodes of the tree one after the other, a path at a time: what a path has of a node is contiguous.
#include "../math/polar.h"
#include "polar_bits.h"

namespace commrt::COMMRT_ISA {
namespace {

constexpr int kUnrolled = 16;  // bits of the largest node whose loops have a fixed length

enum class Known { kNone, kSome, kAll };

COMMRT_INLINE Known known_among(const std::uint8_t* known, int n) {
  constexpr int kStep = 64;
  bool is_none = true, is_all = true;
  for (int begin = 0; begin < n && (is_none || is_all); begin += kStep) {
    const int count = n < kStep ? n : kStep;
    int sum = 0;
    for (int i = 0; i < count; ++i) sum += known[begin + i] != 0;
    is_none &= sum == 0;
    is_all &= sum == count;
  }
  return is_all ? Known::kAll : is_none ? Known::kNone : Known::kSome;
}

// The sum of term(i) over a node, in the order that all devices have.
template <typename Term>
COMMRT_INLINE float sum_over(int n, Term term) {
  float lane[kCostLanes] = {};
  const int width = n < kCostLanes ? n : kCostLanes;
  for (int first = 0; first < n; first += width) {
    for (int i = 0; i < width; ++i) lane[i] += term(first + i);
  }
  for (int half = width / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

// The first of the weakest bits, not counting bit `but`.
COMMRT_INLINE int weakest(const float* llr, int n, int but) {
  constexpr std::uint32_t kNever = 0xffffffffu;
  const auto strength = [=](int i) COMMRT_INLINE_LAMBDA {
    return i == but ? kNever : magnitude_bits(llr[i]);
  };
  std::uint32_t least = kNever;
  for (int i = 0; i < n; ++i) least = strength(i) < least ? strength(i) : least;
  int index = 0;
  while (strength(index) != least) ++index;
  return index;
}

// The ways in which paths go on at a node of which nothing is known, the likeliest first.
template <int paths>
struct Choices {
  int weak[paths][2];  // of each path there was, the bits that may be turned over
  float cost[4 * paths];
  int order[paths], kept = 0;

  // A path's four ways, or two if there is one bit: bit k of the choice turns weak bit k over.
  void add(int path, int each, float base, const float* llr) {
    float* ways = cost + each * path;
    ways[0] = base;
    ways[1] = base + magnitude(llr[weak[path][0]]);
    if (each == 2) return;
    const float second = magnitude(llr[weak[path][1]]);
    ways[2] = base + second;
    ways[3] = ways[1] + second;
  }

  void sort(int count) {
    for (int way = 0; way < count; ++way) {
      int at = kept;
      for (; at > 0 && cost[way] < cost[order[at - 1]]; --at) {
        if (at < paths) order[at] = order[at - 1];
      }
      if (at < paths) order[at] = way;
      kept += kept < paths;
    }
  }
};

// One block.
template <int paths>
class Decoder {
 public:
  using Llrs = const float* [paths];
  using Bits = std::uint8_t* [paths];
  // Which of the paths before a node each path after it comes from.
  struct Origin {
    int of[paths];
  };

  Decoder(const std::uint8_t* known, const std::uint8_t* values, float* levels)
      : known_(known), values_(values), levels_(levels) {}

  // Decide the bits of the node that begins at `first`. `size` is `n`, or 0: known at run time only.
  template <int size>
  Origin node(const Llrs& llr, int first, int n, const Bits& bits, std::uint8_t* lefts) {
    if constexpr (size > 0) n = size;
    const Known known = known_among(known_ + first, n);
    if (known == Known::kAll) return take(llr, first, n, bits);
    if (known == Known::kNone) return decide(llr, n, bits);
    if constexpr (size != 1) return combine_halves<size>(llr, first, n, bits, lefts);
    __builtin_unreachable();
  }

  int likeliest() const {
    int best = 0;
    for (int p = 1; p < count_; ++p) best = cost_[p] < cost_[best] ? p : best;
    return best;
  }

 private:
  template <int size>
  COMMRT_MEMBER Origin combine_halves(const Llrs& llr, int first, int n, const Bits& bits,
                                      std::uint8_t* lefts) {
    if constexpr (size > 0) n = size;
    const int half = n / 2;
    float* own[paths];
    Llrs child;
    Bits left, right;
    for (int p = 0; p < paths; ++p) {
      child[p] = own[p] = levels_ + (paths + p) * half;
      left[p] = paths == 1 ? bits[p] : lefts + (paths + p) * half;
      right[p] = bits[p] + half;
    }
    for (int p = 0; p < count_; ++p) {
      const float* from = llr[p];
      for (int i = 0; i < half; ++i) own[p][i] = boxplus(from[i], from[i + half]);
    }
    const Origin of_left = child_node<size>(child, first, half, left, lefts);
    for (int p = 0; p < count_; ++p) {
      const float* from = llr[of_left.of[p]];
      for (int i = 0; i < half; ++i) own[p][i] = combine(from[i], from[i + half], left[p][i]);
    }
    Origin origin = child_node<size>(child, first + half, half, right, lefts);
    for (int p = 0; p < count_; ++p) {
      const std::uint8_t* from = left[origin.of[p]];
      for (int i = 0; i < half; ++i) bits[p][i] = from[i] ^ right[p][i];
      origin.of[p] = of_left.of[origin.of[p]];
    }
    return origin;
  }

  template <int size>
  COMMRT_MEMBER Origin child_node(const Llrs& llr, int first, int n, const Bits& bits,
                                  std::uint8_t* lefts) {
    if constexpr (size > 0) return node<size / 2>(llr, first, n, bits, lefts);
    if (n == kUnrolled) return node<kUnrolled>(llr, first, n, bits, lefts);
    return node<0>(llr, first, n, bits, lefts);
  }

  // All u are known.
  COMMRT_MEMBER Origin take(const Llrs& llr, int first, int n, const Bits& bits) {
    for (int i = 0; i < n; ++i) bits[0][i] = values_[first + i] & 1;
    transform(bits[0], n);
    Origin origin = {};
    if constexpr (paths == 1) return origin;
    for (int p = 0; p < count_; ++p) {
      if (p > 0) std::memcpy(bits[p], bits[0], static_cast<std::size_t>(n));
      cost_[p] +=
          sum_over(n, [=](int i) COMMRT_INLINE_LAMBDA { return bit_cost(llr[p][i], bits[0][i]); });
      origin.of[p] = p;
    }
    return origin;
  }

  // None is known.
  COMMRT_MEMBER Origin decide(const Llrs& llr, int n, const Bits& bits) {
    Origin origin = {};
    if constexpr (paths == 1) {
      harden(llr[0], n, bits[0]);
      return origin;
    }
    Choices<paths> choices;
    const int each = n == 1 ? 2 : 4;
    for (int p = 0; p < count_; ++p) {
      const float* from = llr[p];
      choices.weak[p][0] = weakest(from, n, -1);
      choices.weak[p][1] = n == 1 ? 0 : weakest(from, n, choices.weak[p][0]);
      const float certain =
          sum_over(n, [=](int i) COMMRT_INLINE_LAMBDA { return soft_margin(magnitude(from[i])); });
      choices.add(p, each, cost_[p] + certain, from);
    }
    choices.sort(each * count_);
    count_ = choices.kept;
    for (int p = 0; p < count_; ++p) {
      const int way = choices.order[p], from = way / each;
      origin.of[p] = from;
      cost_[p] = choices.cost[way] - choices.cost[choices.order[0]];
      harden(llr[from], n, bits[p]);
      for (int k = 0; k < 2; ++k) bits[p][choices.weak[from][k]] ^= way % each >> k & 1;
    }
    return origin;
  }

  COMMRT_MEMBER void harden(const float* llr, int n, std::uint8_t* bits) {
    for (int i = 0; i < n; ++i) bits[i] = llr[i] < 0.0f;
  }

  const std::uint8_t *known_, *values_;
  float* levels_;
  int count_ = 1;
  float cost_[paths] = {};
};

template <int paths>
void decode_block(const PolarDecodeArgs& args, std::int64_t block) {
  const int n = 1 << args.log2_size;
  float* clean = args.scratch + block * polar_scratch(args.log2_size, paths);
  float* levels = clean + n;
  auto* lefts = reinterpret_cast<std::uint8_t*>(levels + paths * n);
  std::uint8_t* decoded = args.bits + block * n;
  for (int i = 0; i < n; ++i) clean[i] = clean_llr(args.llr[block * n + i]);
  typename Decoder<paths>::Llrs llr;
  typename Decoder<paths>::Bits bits;
  for (int p = 0; p < paths; ++p) {
    llr[p] = clean;
    bits[p] = paths == 1 ? decoded : lefts + (paths + p) * n;
  }
  Decoder<paths> decoder(args.known + block * args.known_stride, args.values + block * n, levels);
  decoder.template node<0>(llr, 0, n, bits, lefts);
  if constexpr (paths > 1) {
    std::memcpy(decoded, bits[decoder.likeliest()], static_cast<std::size_t>(n));
  }
}

}  // namespace

void polar_decode(const PolarDecodeArgs& args, std::int64_t begin, std::int64_t end) {
  with_paths(args.paths, [&]<int paths>() {
    for (std::int64_t block = begin; block < end; ++block) decode_block<paths>(args, block);
  });
}

}  // namespace commrt::COMMRT_ISA
