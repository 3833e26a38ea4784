// kCudaCuts: where a GPU wants its cuts. Also without CUDA: simulations plan by it.
#pragma once

#include "graph/planner.h"

namespace flowprefill {

// Slices of whole tiles of the matrix kernels (64 to 256 rows), and not so few that most
// multiprocessors idle. On an H200 the products of a layer of 8B take 1.27 ms for 2,048 rows, 1.35
// for twice 1,024; attention takes the same time for 128 queries of each multiprocessor, one tile
// of Hopper's kernel, as for fewer. Slices of 512 rows there cost 6.7 % on 6k tokens and nothing on
// 30k, those of all rows and two KV heads of eight 17 and 3.4 %.
inline constexpr CutRules kCudaCuts{
    .row_step = 256,
    .max_tile_rows = 2048,
    .min_tile_rows = 2048,  // smaller ones have not been measured
    .min_product_parts = 128,
    .multiprocessors = 132,  // of an H100 and an H200; an engine takes those of its device
    .attention_slices = AttentionSlices::kRowsFirst,
    .slices_products = true,
    .min_attention_queries = 128 * 128,
    .attention_tile = 64,
    .chunks_keys = true,  // of Hopper's kernel; an engine without it does not
    .chunk_row_step = 128,
    .embed_rows = 16384,
    .head_tile_rows = 128,
    .costs = {.weight_element_bytes = 2, .embed_row_s = 2e-8, .kept_element_s = 1e-11}};

}  // namespace flowprefill
