#include "dither_tile.h"

namespace commrt::COMMRT_ISA {
namespace {

struct Rows {
  Tile<std::int16_t> contexts, rows;
};

template <Lattice lattice>
COMMRT_PHASE void write_rows(const float* energies, const float* uniform, const RowTable& table,
                             int count, Rows& to) {
  constexpr int vectors = kCell<lattice>;
  for (int i = 0; i < count; i += vectors * kLanes) {
    Vf u[vectors];
    load_dither<lattice>(uniform + i, u);
    restore<lattice>(u);
    for (int k = 0; k < vectors; ++k) {
      const int at = i + k * kLanes;
      table.store(to.contexts.value + at, to.rows.value + at, load<DType::kFloat32>(energies + at),
                  to_phase<lattice>(u[k]));
    }
  }
}

// Elements [begin, end) of what the tile has.
COMMRT_INLINE void take(const Tile<std::int16_t>& tile, const Piece& piece, std::int64_t begin,
                        std::int64_t end, std::int16_t* to) {
  std::memcpy(to + begin, tile.value + (begin - piece.first),
              sizeof(std::int16_t) * static_cast<std::size_t>(end - begin));
}

}  // namespace

// Where a piece is of more than one group, all of it is done for each, and the group's part taken.
void scale_rows(const ScaleRowsArgs& args, std::int64_t begin, std::int64_t end) {
  for_each_piece(args.numel, begin, end, [&](const Piece& piece) {
    Tile<float> tile;
    const float* energies = open(args.energies, piece, tile);
    const Uniform uniform(args.dither, piece);
    const auto write_part = [&](int group, std::int64_t from, std::int64_t to) {
      const RowTable table(args.rows_of_class + std::int64_t{group} * args.num_classes,
                           args.num_classes, args.base);
      Rows found;
      with_lattice(args.dither.lattice, [&]<Lattice lattice>() {
        write_rows<lattice>(energies, uniform.begin(), table, piece.padded(), found);
      });
      take(found.rows, piece, from, to, args.rows);
      if (args.contexts != nullptr) take(found.contexts, piece, from, to, args.contexts);
    };
    for_each_part(args.groups, piece.first, piece.first + piece.count, write_part);
  });
}

}  // namespace commrt::COMMRT_ISA
