#include "../rans.h"
#include "rans_symbol.h"

namespace commrt::COMMRT_ISA {

// Whether all rows of the parts are there; if not, some parts are not counted.
bool rans_count(const RansCountArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t part = begin; part < end; ++part) {
    const std::int64_t first = part > 0 ? args.ends[part - 1] : 0, last = args.ends[part];
    std::int64_t* counts = args.counts + part * args.num_rows * kSymbols;
    if (!are_rows(args.rows + first, last - first, args.num_rows)) return false;
    for (std::int64_t j = first; j < last; ++j) {
      ++counts[std::int64_t{args.rows[j]} * kSymbols + symbol_of(args.codes[j])];
    }
  }
  return true;
}

}  // namespace commrt::COMMRT_ISA
