// Where the slices of one operator end, so that few multiprocessors are left without a tile when a
// slice does. Called by the planner. Where CutRules does not tell them, slices are equal.
#pragma once

#include <cstdint>
#include <vector>

#include "graph/planner.h"

namespace flowprefill {

// Ends of so many slices of a product's parts over `rows` rows: equal ones, unless others of at
// most `fitting` parts take fewer turns of all multiprocessors. The first is the shortest then: it
// may ride with what comes before.
std::vector<int32_t> ends_of_product(const CutRules& cuts, int32_t rows, int32_t parts,
                                     int32_t slices, int32_t fitting);

// Ends of `fewest` or up to `most` equal slices of KV heads that have so many (row, query head)
// pairs each: the number that takes fewest turns. 132 multiprocessors take two turns at 192 tiles,
// as at 256.
std::vector<int32_t> ends_of_heads(const CutRules& cuts, int64_t queries, int32_t heads,
                                   int32_t fewest, int32_t most);

// Of so many steps of rows as many as slices of KV heads fill whole turns with: a power of two,
// since heads and tiles are.
int32_t whole_turns(const CutRules& cuts, int32_t steps);

}  // namespace flowprefill
