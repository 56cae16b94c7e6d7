#include "dither_tile.h"

namespace commrt::COMMRT_ISA {
namespace {

template <Lattice lattice>
COMMRT_PHASE void dequantise(const std::int16_t* codes, const float* predicted,
                             const float* uniform, float step, int count, float* values) {
  constexpr int vectors = kCell<lattice>;
  const Vf unit = broadcast(kUnit<lattice>), wide_step = broadcast(step);
  const Vf least = broadcast(kNanCode + 0.5f), nan = broadcast(bits_to_float(0x7fc00000u));
  for (int i = 0; i < count; i += vectors * kLanes) {
    Vf u[vectors];
    load_dither<lattice>(uniform + i, u);
    restore<lattice>(u);
    for (int k = 0; k < vectors; ++k) {
      const int at = i + k * kLanes;
      const Vf code = load_shorts(codes + at), offset = sub(mul(code, unit), u[k]);
      const Vf value = fused(wide_step, offset, load<DType::kFloat32>(predicted + at));
      store<DType::kFloat32>(values + at, where_less(code, least, nan, value));
    }
  }
}

}  // namespace

void dither_dequantise(const DitherDequantiseArgs& args, std::int64_t begin, std::int64_t end) {
  for_each_piece(args.numel, begin, end, [&](const Piece& piece) {
    Tile<std::int16_t> code_tile;
    Tile<float> predicted_tile;
    const std::int16_t* codes = open(args.codes, piece, code_tile);
    const float* predicted = open(args.predicted, piece, predicted_tile);
    const Uniform uniform(args.dither, piece);
    write_piece(args.values, piece, [&](float* values) {
      with_lattice(args.dither.lattice, [&]<Lattice lattice>() {
        dequantise<lattice>(codes, predicted, uniform.begin(), args.step, piece.padded(), values);
      });
    });
  });
}

}  // namespace commrt::COMMRT_ISA
