#include "graph/slices.h"

#include <bit>

namespace flowprefill {
namespace {

int64_t parts_of(int64_t whole, int64_t one) {
  return (whole + one - 1) / one;
}

// Turns of all multiprocessors at these slices, of all tiles that a kernel may have, each by its
// columns: the time that they take.
int64_t turns_of(const CutRules& cuts, int32_t rows, const std::vector<int32_t>& ends) {
  const int64_t tiles_down = parts_of(rows, cuts.product_tile_rows);
  int64_t turns = 0;
  for (const int32_t columns : cuts.product_tile_columns) {
    for (size_t i = 0; i < ends.size(); ++i) {
      const int64_t width = int64_t{ends[i] - (i == 0 ? 0 : ends[i - 1])} * kPartColumns;
      turns += columns * parts_of(tiles_down * parts_of(width, columns), cuts.multiprocessors);
    }
  }
  return turns;
}

}  // namespace

std::vector<int32_t> equal_ends(int32_t parts, int32_t slices) {
  std::vector<int32_t> ends;
  for (int32_t i = 1; i <= slices; ++i)
    ends.push_back(static_cast<int32_t>(int64_t{parts} * i / slices));
  return ends;
}

std::vector<int32_t> ends_of_product(const CutRules& cuts, int32_t rows, int32_t parts,
                                     int32_t slices, int32_t fitting) {
  std::vector<int32_t> ends = equal_ends(parts, slices);
  if (cuts.multiprocessors == 0 || slices == 1)
    return ends;
  int64_t least = turns_of(cuts, rows, ends);
  std::vector<int32_t> others = ends;
  for (auto one = static_cast<int32_t>(parts_of(parts, slices));
       one <= fitting && one * (slices - 1) < parts; ++one) {
    for (int32_t i = 1; i < slices; ++i)
      others[static_cast<size_t>(i) - 1] = parts - one * (slices - i);
    if (const int64_t turns = turns_of(cuts, rows, others); turns < least) {
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
