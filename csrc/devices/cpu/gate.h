// multiply_gate(): the product of gate and up projection with its activation. Called by
// CpuOperators.
#pragma once

#include <cstdint>

#include "devices/cpu/cpu_operators.h"

namespace flowprefill {

// Rows of blocks [begin, end) of the product's columns. input: those rows in the form that their
// weight reads (Linear::multiply_block). Thread: any of the team.
template <typename T>
void multiply_gate(CpuActivations<T>& a, const Operator& op, const Step& step, RowRange rows,
                   int64_t begin, int64_t end, const void* input);

}  // namespace flowprefill
