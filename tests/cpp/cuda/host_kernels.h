// Doubles of the launches of csrc/devices/cuda/kernels/kernels.h: a kernel is work for the fake
// stream. Link them in place of flowprefill_cuda_kernels.
//
// Two kinds of arithmetic. Plain loops, written here, are quick and run under sanitizers; they
// round where the kernels do. Or, where FP_SIMT is compiled in, the kernels' own bodies, one fibre
// per CUDA thread: slow, and neither ThreadSanitizer nor AddressSanitizer follows fibres.
// Products are a plain loop in both.
#pragma once

#include <string>
#include <vector>

namespace fake_kernels {

// Whether later launches run the kernels' own bodies. Throws std::logic_error where FP_SIMT is not.
void use_bodies(bool is_wanted);
bool has_bodies();

// Names of the kernels that ran, in order, since reset().
std::vector<std::string> ran();
void reset();

}  // namespace fake_kernels
