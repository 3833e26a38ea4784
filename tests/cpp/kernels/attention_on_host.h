// run_attention(): the attention kernels' bodies on the host, with the grids of attention.cu. Used
// by the tests of the bodies and by the double of the kernels.
#pragma once

#include "devices/cuda/kernels/attention_body.h"
#include "simt.h"

namespace flowprefill::simt {

template <int kDim>
void run_attention_of(const AttentionArgs& args, uint32_t seed) {
  const bool splits = args.num_merges > 0;
  Grid grid{.x = splits ? args.num_blocks : args.num_tiles,
            .y = args.kv_end - args.kv_begin,
            .threads = 128,
            .shared_bytes = attention_shared_bytes(kDim),
            .seed = seed};
  if (!splits)
    return launch(grid, [&](const Thread& t) { attention_body<kDim>(t, args); });
  launch(grid, [&](const Thread& t) { attention_split_body<kDim>(t, args); });
  grid.x = args.num_merges;
  grid.shared_bytes = 0;
  launch(grid, [&](const Thread& t) { attention_merge_body<kDim>(t, args); });
}

// args: checked. seed: of the order in which threads run.
inline void run_attention(const AttentionArgs& args, uint32_t seed = 1) {
  switch (args.head_dim) {
    case 64:
      return run_attention_of<64>(args, seed);
    case 96:
      return run_attention_of<96>(args, seed);
    case 128:
      return run_attention_of<128>(args, seed);
    default:
      return run_attention_of<256>(args, seed);
  }
}

}  // namespace flowprefill::simt
