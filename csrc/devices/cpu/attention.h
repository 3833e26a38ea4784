// Causal attention of packed rows over the paged KV cache, by row slices.
#pragma once

#include <cstdint>
#include <vector>

#include "devices/cpu/kv_cache.h"

namespace flowprefill {

// One piece of attention work: consecutive rows of one sequence, all query heads of one kv head.
struct AttentionItem {
  int32_t row;  // first row, index into q and out
  int32_t rows;
  int32_t position;  // position of the first row in its sequence
  int32_t kv_head;
  const int32_t* block_table;  // KV blocks of the sequence, in order
};

template <typename T>
struct AttentionArgs {
  KvCache* cache;
  int32_t layer;
  int32_t num_heads;
  int32_t window;  // keys a row may look back on, itself included; 0: all
  float softcap;   // of the scores, which are powers of two; 0: none
  const T* q;      // [rows, num_heads * head_dim], rotated, scaled by log2(e) / sqrt(head_dim)
  T* out;          // same shape
};

// Computes one item: out = softmax(q k^T) v over keys at positions <= the row's. Device thread's
// team.
template <typename T>
void attend(const AttentionArgs<T>& args, const AttentionItem& item);

// Rows per item: enough for the matrix kernel, few enough to share `rows` among the team and stay
// in cache.
int32_t attention_item_rows(int32_t rows, int32_t heads_per_kv, int32_t kv_heads, int32_t threads);

}  // namespace flowprefill
