// The operators of a mixture of experts on the CPU: which experts a row has, and products with
// those alone. Called by CpuOperators (route) and by CpuProgram (multiply_experts).
#pragma once

#include <cstdint>

#include "devices/cpu/cpu_operators.h"
#include "devices/cpu/team.h"

namespace flowprefill {

// kRoute over some rows.
template <typename T>
void route(CpuActivations<T>& activations, const Operator& op, const Step& step, RowRange rows);

// kExperts over all rows of a step, shared out to the team. Rows are sorted by expert and brought
// side by side, in memory that belongs to the calling thread and lasts: for each slot of each row
// of the largest tile, one row of the input.
//
// A row's bits depend on that row alone, but for weights in GGUF's blocks (Linear): there on
// whether few or many rows of the step have the same expert, too. program: its number, unlike that
// of any other: slices of one operator find the rows that the first of them has sorted.
template <typename T>
void multiply_experts(CpuActivations<T>& activations, const Operator& op, const Step& step,
                      int64_t program, Team& team);

}  // namespace flowprefill
