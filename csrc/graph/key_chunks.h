// KeyChunks: how the keys of rows far back in a long sequence are split, so that few rows give work
// to every multiprocessor: a slice of attention that fills the device then takes the same time at
// any length. Asked by the planner, which makes such slices, and by the CUDA backend, whose kernel
// takes the chunks (decisions/006).
#pragma once

#include <cstdint>

namespace flowprefill {

// Of one model on one card. Chunks depend on a row's position alone: never on the run that it is
// computed in, nor on where a plan cuts rows or heads, so its bits do not either.
struct KeyChunks {
  int32_t from = 32768;       // rows at positions before it take all their keys at once
  int32_t rows = 2048;        // the rows of so many positions share their chunks
  int32_t most_keys = 32768;  // of a chunk, before it is rounded up to `step`
  int32_t step = 128;         // chunks are multiples of it: of tiles and blocks of keys
  // Of rows with up to count * most_keys keys; the next multiple of it beyond. 0: none are split.
  int32_t count = 0;

  // Of a model with so many query heads: chunks that give one tile of rows of each head to all
  // multiprocessors but a few.
  static KeyChunks of(int32_t heads, int32_t multiprocessors);

  // Whether rows at some position of sequences of so many keys have chunks.
  bool has_any(int64_t keys) const { return count > 0 && keys > from; }

  // Keys of each chunk of the row at a position, the first at key 0; 0: its keys are not split.
  int32_t keys_at(int32_t position) const;

  // Chunks that such a row has at most; 1: its keys are not split.
  int32_t count_at(int32_t position) const;

  // The first position behind it whose row may have other chunks, or ends in another one.
  int32_t end_at(int32_t position) const;
};

}  // namespace flowprefill
