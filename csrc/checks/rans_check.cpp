// rANS' part of kernel_check: tables of every skew, streams that are whole and such as are damaged.
#include "../cuda/ops.h"
#include "check.h"

namespace commrt {

namespace portable {
void rans_encode(const RansEncodeArgs&, std::int64_t, std::int64_t);
void rans_decode(const RansDecodeArgs&, std::int64_t, std::int64_t);
}  // namespace portable

namespace {

constexpr std::int64_t kSizes[] = {1, 3, 4, 31, 32, 33, 700};
constexpr int kLaneCounts[] = {1, 4, 32};
constexpr int kRows = 5, kNarrowRow = 3, kRareRow = 4;
enum class Damage { kNone, kRow, kSymbol, kFlipped, kShort, kLong, kNoise };

int random_symbol(int row, std::mt19937& random) {
  return static_cast<int>(random() % kSymbols) >> (row == kRareRow ? 0 : row);
}

// Slots of fewer and fewer symbols from row to row; in the last one of all, nearly all of them rare.
std::vector<std::uint16_t> random_table(std::mt19937& random) {
  std::vector<std::uint16_t> starts;
  for (int row = 0; row < kRows; ++row) {
    int slots[kSymbols] = {};
    if (row == kRareRow) {
      for (int& count : slots) count = 1;
      slots[random() % kSymbols] += kSlots - kSymbols;
    } else {
      for (std::uint32_t i = 0; i < kSlots; ++i) ++slots[random_symbol(row, random)];
    }
    int first = 0;
    for (const int count : slots) {
      starts.push_back(static_cast<std::uint16_t>(first));
      first += count;
    }
  }
  return starts;
}

struct Case {
  std::int64_t numel;
  int lanes;
  std::vector<std::uint16_t> starts;
  std::vector<std::int16_t> codes, rows;

  Case(std::int64_t numel, int lanes, std::mt19937& random)
      : numel(numel), lanes(lanes), starts(random_table(random)) {
    const bool is_rare = random() % 3 == 0;  // so that there is nearly a word for each symbol
    for (std::int64_t i = 0; i < numel; ++i) {
      rows.push_back(is_rare ? kRareRow : static_cast<std::int16_t>(random() % kRows));
      codes.push_back(code_of(random_symbol(rows.back(), random)));
    }
  }
  std::int64_t capacity() const { return 2 * lanes + numel; }
  RansTable table() const { return {starts.data(), kRows}; }

  // Codes that escape, each another.
  void tell_apart() {
    for (std::size_t i = 0; i < codes.size(); ++i) {
      if (codes[i] == kEscaped) codes[i] = static_cast<std::int16_t>(1000 + i);
    }
  }

  // A row that is not in the table, or a symbol that has no slots.
  void spoil(Damage kind, std::mt19937& random) {
    const std::size_t where = random() % codes.size();
    if (kind == Damage::kRow) rows[where] = random() % 2 ? -1 : kRows;
    if (kind == Damage::kSymbol) codes[where] = kMostCode, rows[where] = kNarrowRow;
  }
};

// What is written: the first `count` elements, of `size` bytes; behind them is anything.
void forget_rest(Buffer& buffer, std::int64_t count, std::int64_t numel, std::int64_t size) {
  for (std::uint8_t* all : {buffer.cpu(), buffer.gpu()}) {
    std::memset(all + size * count, 0, static_cast<std::size_t>(size * (numel - count)));
  }
}

std::vector<std::uint16_t> check_encode(Checks& checks, const Case& given, std::uint16_t check,
                                        bool may_escape, const std::string& name) {
  Buffer words(2 * given.capacity(), 2), lengths(4, 0), escaped(2 * given.numel, 2), counts(4, 0);
  const auto args = [&](std::uint8_t* to, std::uint8_t* length, std::uint8_t* codes,
                        std::uint8_t* count) {
    return RansEncodeArgs{given.codes.data(),
                          given.rows.data(),
                          given.numel,
                          given.table(),
                          given.lanes,
                          &check,
                          reinterpret_cast<std::uint16_t*>(to),
                          given.capacity(),
                          reinterpret_cast<std::int32_t*>(length),
                          may_escape ? reinterpret_cast<std::int16_t*>(codes) : nullptr,
                          may_escape ? reinterpret_cast<std::int32_t*>(count) : nullptr};
  };
  portable::rans_encode(args(words.cpu(), lengths.cpu(), escaped.cpu(), counts.cpu()), 0, 1);
  cuda::rans_encode(args(words.gpu(), lengths.gpu(), escaped.gpu(), counts.gpu()), {});
  std::int32_t length, num_escaped = 0;
  std::memcpy(&length, lengths.cpu(), sizeof length);
  if (may_escape) std::memcpy(&num_escaped, counts.cpu(), sizeof num_escaped);
  const std::int64_t num_words = length < 0 ? 0 : length;
  forget_rest(words, num_words, given.capacity(), 2);
  forget_rest(escaped, num_escaped, given.numel, 2);
  checks.expect(name, {&lengths, &words, &counts, &escaped});
  const auto* stream = reinterpret_cast<const std::uint16_t*>(words.cpu());
  return {stream, stream + num_words};
}

void check_decode(Checks& checks, const Case& given, const std::vector<std::uint16_t>& stream,
                  std::int32_t length, bool is_whole, const std::string& name) {
  Buffer codes(2 * given.numel, 2), found(2, 0), used(4, 0), wanted(2 * given.numel, 0);
  const auto args = [&](std::uint8_t* to, std::uint8_t* check, std::uint8_t* words) {
    return RansDecodeArgs{stream.data(),
                          static_cast<std::int64_t>(stream.size()),
                          &length,
                          given.rows.data(),
                          given.numel,
                          given.table(),
                          given.lanes,
                          reinterpret_cast<std::int16_t*>(to),
                          reinterpret_cast<std::uint16_t*>(check),
                          reinterpret_cast<std::int32_t*>(words)};
  };
  portable::rans_decode(args(codes.cpu(), found.cpu(), used.cpu()), 0, 1);
  cuda::rans_decode(args(codes.gpu(), found.gpu(), used.gpu()), {});
  wanted.set(given.codes.data());
  if (is_whole) std::memcpy(wanted.gpu(), codes.gpu(), 2 * given.codes.size());
  checks.expect(name, {&codes, &found, &used, &wanted});
}

// The length that is told of it.
std::int32_t damage(std::vector<std::uint16_t>& stream, Damage kind, std::mt19937& random) {
  if (kind == Damage::kFlipped) stream[random() % stream.size()] ^= 1u << random() % 16;
  if (kind == Damage::kShort) stream.resize(random() % stream.size());
  for (std::uint16_t& word : stream) {
    if (kind == Damage::kNoise) word = static_cast<std::uint16_t>(random());
  }
  return static_cast<std::int32_t>(stream.size()) + (kind == Damage::kLong);
}

template <typename Body>
void for_each_case(std::initializer_list<Damage> kinds, std::mt19937& random, Body body) {
  int index = 0;
  for (const int lanes : kLaneCounts) {
    for (const std::int64_t numel : kSizes) {
      for (const Damage kind : kinds) {
        body(Case(numel, lanes, random), kind, "case " + std::to_string(++index));
      }
    }
  }
}

}  // namespace

void check_rans_encode(Checks& checks, std::mt19937& random) {
  for_each_case({Damage::kNone, Damage::kRow, Damage::kSymbol}, random,
                [&](Case given, Damage kind, const std::string& name) {
                  given.spoil(kind, random);
                  const auto check = static_cast<std::uint16_t>(random());
                  check_encode(checks, given, check, false, "rans_encode " + name);
                  given.tell_apart();
                  check_encode(checks, given, check, true, "escaping " + name);
                });
}

void check_rans_decode(Checks& checks, std::mt19937& random) {
  for_each_case({Damage::kNone, Damage::kRow, Damage::kFlipped, Damage::kShort, Damage::kLong,
                 Damage::kNoise},
                random, [&](Case given, Damage kind, const std::string& name) {
                  std::vector<std::uint16_t> stream = check_encode(checks, given, 7, false, name);
                  given.spoil(kind, random);
                  const std::int32_t length = damage(stream, kind, random);
                  check_decode(checks, given, stream, length, kind == Damage::kNone,
                               "rans_decode " + name);
                });
}

}  // namespace commrt
