#include "dither_tile.h"

namespace commrt::COMMRT_ISA {
namespace {

template <Lattice lattice>
COMMRT_PHASE void quantise(const float* values, const float* predicted, const float* uniform,
                           float inverse_step, int count, std::int16_t* codes) {
  constexpr int vectors = kCell<lattice>;
  const Vf inverse = broadcast(inverse_step);
  for (int i = 0; i < count; i += vectors * kLanes) {
    Vf x[vectors], u[vectors];
    for (int k = 0; k < vectors; ++k) {
      const int at = i + k * kLanes;
      const Vf difference =
          sub(load<DType::kFloat32>(values + at), load<DType::kFloat32>(predicted + at));
      x[k] = mul(difference, inverse);
    }
    arrange<lattice>(x);
    load_dither<lattice>(uniform + i, u);
    for (int k = 0; k < vectors; ++k) x[k] = clamp_number(add(x[k], u[k]), kLimit<lattice>);
    to_codes<lattice>(x);
    restore<lattice>(x);
    for (int k = 0; k < vectors; ++k) store_shorts(codes + i + k * kLanes, x[k]);
  }
}

}  // namespace

void dither_quantise(const DitherQuantiseArgs& args, std::int64_t begin, std::int64_t end) {
  const float inverse_step = 1.0f / args.step;
  for_each_piece(args.numel, begin, end, [&](const Piece& piece) {
    Tile<float> value_tile, predicted_tile;
    const float* values = open(args.values, piece, value_tile);
    const float* predicted = open(args.predicted, piece, predicted_tile);
    const Uniform uniform(args.dither, piece);
    write_piece(args.codes, piece, [&](std::int16_t* codes) {
      with_lattice(args.dither.lattice, [&]<Lattice lattice>() {
        quantise<lattice>(values, predicted, uniform.begin(), inverse_step, piece.padded(), codes);
      });
    });
  });
}

}  // namespace commrt::COMMRT_ISA
