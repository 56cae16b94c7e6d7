// The part of kernel_check that sources have. They have no CUDA kernel: what is checked is the CPU's,
// compiled once more here, as the tier builds it.
#include "../sources.h"
#include "check.h"

// Vectors are passed by value, but not to other files.
#pragma GCC diagnostic ignored "-Wpsabi"
#define COMMRT_ISA checked
#include "../cpu/source_energies.cpp"
#include "../cpu/source_history.cpp"
#include "../cpu/source_prediction.cpp"
#include "../cpu/source_products.cpp"
#include "../cpu/update_add.cpp"

namespace commrt {

namespace portable {
void source_energies(const SourceEnergiesArgs&, const EnergySums&, std::int64_t, std::int64_t);
void source_prediction(const SourcePredictionArgs&, std::int64_t, std::int64_t);
void source_products(const SourceProductsArgs&, std::int64_t, std::int64_t);
void source_history(const SourceHistoryArgs&, std::int64_t, std::int64_t);
void update_add(const UpdateAddArgs&, std::int64_t, std::int64_t);
}  // namespace portable

namespace {

constexpr std::int64_t kSizes[] = {1, 15, 16, 1023, 1024, 1025, 3000};
constexpr std::int64_t kShapes[][2] = {{1, 1}, {1, 100}, {100, 1}, {2, 2}, {17, 65}, {300, 7}};

// Numbers of any size up to one, as fp32 and, by their halves, as bf16.
std::vector<float> random_floats(std::int64_t count, std::mt19937& random) {
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) {
    value = bits_to_float(static_cast<std::uint32_t>(random()) & 0xbf7fbf7fu);
  }
  return values;
}

// Two sources, of which each is fp32, bf16 or none.
struct Sources {
  Sources(std::int64_t count, int index, std::mt19937& random)
      : numel(count), kind(index), previous(4 * count, 4), own(4 * count, 4) {
    previous.set(random_floats(count, random).data());
    own.set(random_floats(count, random).data());
  }

  template <typename Place>
  Source first(Place place) {
    return {kind % 3 == 2 ? nullptr : place(previous), static_cast<DType>(kind % 3 % 2)};
  }
  template <typename Place>
  Source second(Place place) {
    return {kind / 3 == 2 ? nullptr : place(own), static_cast<DType>(kind / 3 % 2)};
  }

  std::int64_t numel;
  int kind;
  Buffer previous, own;
};

std::string describe(const char* op, std::int64_t numel, int kind) {
  return std::string(op) + " numel " + std::to_string(numel) + " kind " + std::to_string(kind);
}

const auto on_heap = [](Buffer& buffer) { return buffer.gpu(); };
const auto aligned = [](Buffer& buffer) { return buffer.cpu(); };

template <typename Body>
void for_each_case(std::mt19937& random, Body body) {
  for (const std::int64_t numel : kSizes) {
    for (int kind = 0; kind < 9; ++kind) {
      Sources sources(numel, kind, random);
      body(sources, (numel + kSourceTile - 1) / kSourceTile);
    }
  }
}

}  // namespace

void check_source_energies(Checks& checks, std::mt19937& random) {
  for (const auto& [rows, cols] : kShapes) {
    for (int kind = 0; kind < 9; ++kind) {
      const std::int64_t count = rows * cols, numel = 2 * count;
      const Matrix matrices[] = {{0, rows, cols}, {count, cols, rows}};
      const std::int64_t most = rows < cols ? cols : rows;
      Sources sources(numel, kind, random);
      Buffer energies(4 * numel, 4), of_row(8 * most, 8), of_col(8 * most, 8), col(4 * most, 4);
      const auto run = [&](auto kernel, auto place) {
        const auto sums = EnergySums{reinterpret_cast<std::int64_t*>(place(of_row)),
                                     reinterpret_cast<std::int64_t*>(place(of_col)),
                                     reinterpret_cast<float*>(place(col))};
        kernel({sources.first(place), sources.second(place), 0.3f, matrices,
                reinterpret_cast<float*>(place(energies))},
               sums, 0, 2);
      };
      run(portable::source_energies, aligned);
      run(checked::source_energies, on_heap);
      checks.expect(describe("source_energies", numel, kind), {&energies});
    }
  }
}

void check_source_prediction(Checks& checks, std::mt19937& random) {
  for_each_case(random, [&](Sources& sources, std::int64_t tiles) {
    const std::int64_t ends[] = {sources.numel / 3, sources.numel / 3, sources.numel};
    const float weights[] = {0.5f, -1.5f, 1.0f, 1.0f, 0.0f, 0.3f};
    Buffer predicted(4 * sources.numel, 4);
    const auto run = [&](auto kernel, auto place) {
      kernel({sources.first(place),
              sources.second(place),
              weights,
              {ends, 3},
              reinterpret_cast<float*>(place(predicted)),
              sources.numel},
             0, tiles);
    };
    run(portable::source_prediction, aligned);
    run(checked::source_prediction, on_heap);
    checks.expect(describe("source_prediction", sources.numel, sources.kind), {&predicted});
  });
}

void check_source_products(Checks& checks, std::mt19937& random) {
  for_each_case(random, [&](Sources& sources, std::int64_t) {
    const std::int64_t ends[] = {sources.numel / 2, -4, 1LL << 40};
    Buffer update(4 * sources.numel, 4), products(8 * 3 * kNumProducts, 8);
    update.set(random_floats(sources.numel, random).data());
    const auto run = [&](auto kernel, auto place) {
      kernel({reinterpret_cast<const float*>(place(update)),
              sources.first(place),
              sources.second(place),
              {ends, 3},
              reinterpret_cast<double*>(place(products)),
              sources.numel},
             0, 3);
    };
    run(portable::source_products, aligned);
    run(checked::source_products, on_heap);
    checks.expect(describe("source_products", sources.numel, sources.kind), {&products});
  });
}

void check_source_history(Checks& checks, std::mt19937& random) {
  for_each_case(random, [&](Sources& sources, std::int64_t tiles) {
    const std::int64_t numel = sources.numel;
    const int num_shares = 1 << sources.kind;
    Buffer rows(2 * numel, 2), shares(4 * num_shares, 4), kept(2 * numel, 2);
    rows.set(random_floats(numel, random).data());  // of any bits
    shares.set(random_floats(num_shares, random).data());
    const auto run = [&](auto kernel, auto place) {
      kernel({reinterpret_cast<const float*>(place(sources.previous)),
              reinterpret_cast<const float*>(place(sources.own)),
              reinterpret_cast<const std::int16_t*>(place(rows)),
              reinterpret_cast<const float*>(place(shares)), num_shares,
              reinterpret_cast<std::uint16_t*>(place(kept)), numel},
             0, tiles);
    };
    run(portable::source_history, aligned);
    run(checked::source_history, on_heap);
    checks.expect(describe("source_history", numel, sources.kind), {&kept});
  });
}

void check_update_add(Checks& checks, std::mt19937& random) {
  for_each_case(random, [&](Sources& sources, std::int64_t tiles) {
    const std::int64_t numel = sources.numel, count = sources.kind % 3, stride = numel + 3;
    const double factors[] = {0x1p40, -3.7};
    Buffer updates(4 * (count * stride + 1), 4), total(8 * numel, 8);
    updates.set(random_floats(count * stride + 1, random).data());
    const auto run = [&](auto kernel, auto place) {
      kernel({reinterpret_cast<const float*>(place(updates)), stride, factors, count,
              reinterpret_cast<double*>(place(total)), numel},
             0, tiles);
    };
    run(portable::update_add, aligned);
    run(checked::update_add, on_heap);
    checks.expect(describe("update_add", numel, sources.kind), {&total});
  });
}

}  // namespace commrt
