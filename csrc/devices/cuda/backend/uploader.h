// Uploader: copies tensors of the host to the device in pieces through pinned memory, matrices
// rounded to bf16 or e4m3 on the way. Used by DeviceWeights while a model is loaded.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "devices/cuda/kernels/fp8.h"
#include "devices/cuda/runtime/memory.h"
#include "devices/cuda/runtime/stream.h"
#include "devices/cuda/runtime/stream_event.h"

namespace flowprefill {

// Thread: one at a time.
class Uploader {
 public:
  // piece_bytes: of each of the two pieces that take turns: one is filled while the other is
  // copied. Throws CudaError.
  Uploader(int device, size_t piece_bytes);
  ~Uploader();
  Uploader(const Uploader&) = delete;
  Uploader& operator=(const Uploader&) = delete;

  // Row i of `values` [rows, columns], rounded to the nearest bf16 (ties to even), to
  // to + i * row_stride. `values` may go when it returns. Throws CudaError, std::invalid_argument
  // if a row does not fit a piece.
  void matrix(const float* values, int64_t rows, int64_t columns, Bf16* to, int64_t row_stride);
  // Row i in e4m3 (fp8.h), its largest becoming 448, to to + i * row_stride; returns what each row
  // was divided by, [rows]. Throws as matrix().
  std::vector<float> quantised(const float* values, int64_t rows, int64_t columns, E4m3* to,
                               int64_t row_stride);
  // Row i, `columns` bytes from codes + i * code_stride on, to to + i * row_stride.
  void codes(const uint8_t* codes, int64_t code_stride, int64_t rows, int64_t columns, E4m3* to,
             int64_t row_stride);
  // values[i] to to[i * stride].
  void vector(const float* values, int64_t count, float* to, int64_t stride);
  // `bytes` of them as they are.
  void raw(const void* values, size_t bytes, void* to);

  // Waits until everything has arrived. Throws CudaError.
  void finish();

 private:
  struct Piece {
    PinnedBlock memory;
    StreamEvent copied;
    bool is_in_flight = false;
  };

  // rows of row_bytes each, made by fill(first row, count, into), to `to` with `pitch` bytes
  // between rows.
  template <typename Fill>
  void upload(int64_t rows, size_t row_bytes, void* to, size_t pitch, const Fill& fill);
  Piece& next_piece();

  const int device_;
  const size_t piece_bytes_;
  PinnedPool pinned_;
  const Stream stream_;
  std::array<Piece, 2> pieces_;
  size_t num_pieces_ = 0;  // used so far
};

}  // namespace flowprefill
