#include "dither_tile.h"

namespace commrt::COMMRT_ISA {
namespace {

template <DType dtype, Lattice lattice>
COMMRT_PHASE void write_rows(const Element<dtype>* own, const float* shared, float shared_weight,
                             const float* uniform, const RowTable& table, int count,
                             std::int16_t* rows) {
  constexpr int vectors = kCell<lattice>;
  const Vf weight = broadcast(shared_weight);
  for (int i = 0; i < count; i += vectors * kLanes) {
    Vf u[vectors];
    load_dither<lattice>(uniform + i, u);
    restore<lattice>(u);
    for (int k = 0; k < vectors; ++k) {
      const int at = i + k * kLanes;
      const Vf x = load<dtype>(own + at), y = load<DType::kFloat32>(shared + at);
      const Vf energy = add(mul(x, x), mul(weight, mul(y, y)));
      table.store(rows + at, energy, to_phase<lattice>(u[k]));
    }
  }
}

}  // namespace

void scale_rows(const ScaleRowsArgs& args, std::int64_t begin, std::int64_t end) {
  const RowTable table(args.rows_of_class, args.num_classes, args.base);
  for_each_piece(args.numel, begin, end, [&](const Piece& piece) {
    Tile<float> shared_tile;
    const float* shared = open(args.shared, piece, shared_tile);
    const Uniform uniform(args.dither, piece);
    with_dtype(args.own_dtype, [&]<DType dtype>() {
      Tile<Element<dtype>> own_tile;
      const auto* own = open(static_cast<const Element<dtype>*>(args.own), piece, own_tile);
      write_piece(args.rows, piece, [&](std::int16_t* rows) {
        with_lattice(args.dither.lattice, [&]<Lattice lattice>() {
          write_rows<dtype, lattice>(own, shared, args.shared_weight, uniform.begin(), table,
                                     piece.padded(), rows);
        });
      });
    });
  });
}

}  // namespace commrt::COMMRT_ISA
