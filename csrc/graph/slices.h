// Where the slices of one operator end, so that few multiprocessors are left without a tile when a
// slice does. Called by the planner. Where CutRules does not tell them, slices are equal.
#pragma once

#include <cstdint>
#include <vector>

#include "graph/planner.h"

namespace flowprefill {

std::vector<int32_t> equal_ends(int32_t parts, int32_t slices);

// Ends of so many slices of a product's parts over `rows` rows: equal ones, unless others of at
// most `fitting` parts take fewer turns of all multiprocessors. The first is the shortest then: it
// may ride with what comes before.
std::vector<int32_t> ends_of_product(const CutRules& cuts, int32_t rows, int32_t parts,
                                     int32_t slices, int32_t fitting);

// Of so many steps of rows as many as tiles of attention fill turns with, a power of two: 132
// multiprocessors take two turns at the 192 tiles of three steps of 256 rows and 32 heads, as at
// 256.
int32_t whole_turns(const CutRules& cuts, int32_t steps);

}  // namespace flowprefill
