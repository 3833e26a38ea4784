// run_attention(): the attention kernels' bodies on the host, with the grids of attention.cu. Used
// by the tests of the bodies and by the double of the kernels.
#pragma once

#include "devices/cuda/kernels/attention_body.h"
#include "simt.h"

namespace flowprefill::simt {

// Calls `run` with the head size as its template argument.
template <typename Run>
void with_head_size(int32_t head_dim, const Run& run) {
  switch (head_dim) {
    case 64:
      return run.template operator()<64>();
    case 96:
      return run.template operator()<96>();
    case 128:
      return run.template operator()<128>();
    default:
      return run.template operator()<256>();
  }
}

inline Grid attention_grid(const AttentionArgs& args, int32_t blocks, uint32_t seed) {
  return {.x = blocks,
          .y = args.kv_end - args.kv_begin,
          .threads = 128,
          .seed = seed,
          .overlaps = true};
}

// The first kernel of launch_attention(). args: checked. seed: of the order in which threads run.
inline void run_attention_tiles(const AttentionArgs& args, uint32_t seed = 1) {
  with_head_size(args.head_dim, [&]<int kDim>() {
    Grid grid = attention_grid(args, num_blocks_of(args), seed);
    grid.shared_bytes = attention_shared_bytes(kDim);
    launch(grid, [&](const Thread& t) { attention_body<kDim>(t, args); });
  });
}

// The second, where there are merges.
inline void run_attention_merges(const AttentionArgs& args, uint32_t seed = 1) {
  with_head_size(args.head_dim, [&]<int kDim>() {
    launch(attention_grid(args, args.num_merges, seed),
           [&](const Thread& t) { attention_merge_body<kDim>(t, args); });
  });
}

inline void run_attention(const AttentionArgs& args, uint32_t seed = 1) {
  run_attention_tiles(args, seed);
  if (args.num_merges > 0)
    run_attention_merges(args, seed);
}

}  // namespace flowprefill::simt
