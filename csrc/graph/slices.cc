#include "graph/slices.h"

#include <bit>
#include <limits>

namespace flowprefill {
namespace {

int64_t parts_of(int64_t whole, int64_t one) {
  return (whole + one - 1) / one;
}

std::vector<int32_t> equal_ends(int32_t parts, int32_t slices) {
  std::vector<int32_t> ends;
  for (int32_t i = 1; i <= slices; ++i)
    ends.push_back(parts * i / slices);
  return ends;
}

// Turns at slices of whose parts each has so many columns and is computed by tiles of rows and
// columns.
int64_t turns_at(const CutRules& cuts, int64_t tiles_down, const std::vector<int32_t>& ends,
                 int64_t part_columns, int64_t tile_columns) {
  int64_t turns = 0;
  for (size_t i = 0; i < ends.size(); ++i) {
    const int32_t parts = ends[i] - (i == 0 ? 0 : ends[i - 1]);
    const int64_t tiles = tiles_down * parts_of(parts * part_columns, tile_columns);
    turns += parts_of(tiles, cuts.multiprocessors);
  }
  return turns;
}

// Of all tiles that a kernel may have, each by its columns: the time that they take.
int64_t product_turns(const CutRules& cuts, int32_t rows, const std::vector<int32_t>& ends) {
  const int64_t tiles_down = parts_of(rows, cuts.product_tile_rows);
  int64_t turns = 0;
  for (const int32_t columns : cuts.product_tile_columns)
    turns += columns * turns_at(cuts, tiles_down, ends, kPartColumns, columns);
  return turns;
}

}  // namespace

std::vector<int32_t> ends_of_product(const CutRules& cuts, int32_t rows, int32_t parts,
                                     int32_t slices, int32_t fitting) {
  std::vector<int32_t> ends = equal_ends(parts, slices);
  if (cuts.multiprocessors == 0 || slices == 1)
    return ends;
  int64_t least = product_turns(cuts, rows, ends);
  std::vector<int32_t> others = ends;
  for (auto one = static_cast<int32_t>(parts_of(parts, slices));
       one <= fitting && one * (slices - 1) < parts; ++one) {
    for (int32_t i = 1; i < slices; ++i)
      others[static_cast<size_t>(i) - 1] = parts - one * (slices - i);
    if (const int64_t turns = product_turns(cuts, rows, others); turns < least) {
      least = turns;
      ends = others;
    }
  }
  return ends;
}

std::vector<int32_t> ends_of_heads(const CutRules& cuts, int64_t queries, int32_t heads,
                                   int32_t fewest, int32_t most) {
  std::vector<int32_t> ends = equal_ends(heads, fewest);
  if (cuts.multiprocessors == 0)
    return ends;
  const int64_t tiles = parts_of(queries, cuts.product_tile_rows);
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int32_t slices = fewest; slices <= most; ++slices) {
    const std::vector<int32_t> others = equal_ends(heads, slices);
    if (const int64_t turns = turns_at(cuts, tiles, others, 1, 1); turns < least) {
      least = turns;
      ends = others;
    }
  }
  return ends;
}

int32_t whole_turns(const CutRules& cuts, int32_t steps) {
  if (cuts.multiprocessors == 0 || steps < 1)
    return steps;
  return static_cast<int32_t>(std::bit_floor(static_cast<uint32_t>(steps)));
}

}  // namespace flowprefill
