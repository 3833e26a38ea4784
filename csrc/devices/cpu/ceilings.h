// What this machine can do at most: operations per second of each element type, and bytes read per
// second from memory of several sizes. Called by csrc/bindings for `flowprefill doctor` and
// benches.
#pragma once

#include <cstdint>
#include <vector>

namespace flowprefill {

struct Ceilings {
  // Operations per second, two for each multiplication that is added, of the instruction that
  // products use, with operands in registers (f32 without AVX2: of a product in L1). 0: there is
  // none for it.
  double f32 = 0.0;
  double bf16 = 0.0;
  double int8 = 0.0;

  // Weights read by products of one row, as decoding does.
  struct Read {
    int64_t bytes;  // that all threads together read over and over
    double bytes_per_s;
  };
  std::vector<Read> reads;  // in the L2 caches, beyond them, in DRAM (256 MiB)
};

// Measures with so many threads, each figure the best of some short tries; about half a second.
// Throws std::invalid_argument unless threads >= 1, and what isa() throws. Other work on the
// machine lowers the figures.
Ceilings measure_ceilings(int threads);

}  // namespace flowprefill
