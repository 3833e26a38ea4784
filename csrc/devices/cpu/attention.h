// Causal attention of packed rows over the paged KV cache, by row slices and spans of keys. Called
// by CpuProgram.
#pragma once

#include <cstdint>
#include <span>

#include "devices/cpu/kv_cache.h"
#include "devices/cpu/team.h"

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

// Keys of a sequence are attended in spans of so many, from its first on: the softmax of each span
// is worked out on its own, then they are merged in order. So a row has the same bits whether one
// thread takes all its spans or each another.
inline constexpr int32_t kSpanKeys = 1024;

// Computes all items: out = softmax(q k^T) v over keys at positions <= the row's. An item of few
// rows that is much of the whole, as a long sequence's in a decode step, is shared out by spans.
template <typename T>
void attend(const AttentionArgs<T>& args, std::span<const AttentionItem> items, Team& team);

// Rows per item: enough for the matrix kernel, few enough to share `rows` among the team and stay
// in cache.
int32_t attention_item_rows(int32_t rows, int32_t heads_per_kv, int32_t kv_heads, int32_t threads);

}  // namespace flowprefill
