#include "devices/cuda/backend/uploader.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace flowprefill {

Uploader::Uploader(int device, size_t piece_bytes)
    : device_((FP_CUDA(cudaSetDevice(device)), device)),
      piece_bytes_(piece_bytes),
      pinned_(device),
      stream_(Stream::make()) {
  for (Piece& piece : pieces_) {
    piece.memory = pinned_.take(piece_bytes);
    piece.copied = StreamEvent::make();
  }
}

Uploader::~Uploader() {
  ignore(cudaStreamSynchronize(stream_.get()));  // the pieces may still be read
}

Uploader::Piece& Uploader::next_piece() {
  Piece& piece = pieces_[num_pieces_++ % pieces_.size()];
  if (piece.is_in_flight)
    piece.copied.wait();
  piece.is_in_flight = false;
  return piece;
}

template <typename Fill>
void Uploader::upload(int64_t rows, size_t row_bytes, void* to, size_t pitch, const Fill& fill) {
  if (row_bytes > piece_bytes_) {
    throw std::invalid_argument("a row: got " + std::to_string(row_bytes) +
                                " bytes, expected at most " + std::to_string(piece_bytes_));
  }
  FP_CUDA(cudaSetDevice(device_));
  const auto rows_at_once = static_cast<int64_t>(piece_bytes_ / row_bytes);
  for (int64_t row = 0; row < rows; row += rows_at_once) {
    const int64_t count = std::min(rows_at_once, rows - row);
    Piece& piece = next_piece();
    fill(row, count, piece.memory.get());
    auto* target = static_cast<std::byte*>(to) + static_cast<size_t>(row) * pitch;
    const auto height = static_cast<size_t>(count);
    if (pitch == row_bytes) {
      FP_CUDA(cudaMemcpyAsync(target, piece.memory.get(), height * row_bytes,
                              cudaMemcpyHostToDevice, stream_.get()));
    } else {
      FP_CUDA(cudaMemcpy2DAsync(target, pitch, piece.memory.get(), row_bytes, row_bytes, height,
                                cudaMemcpyHostToDevice, stream_.get()));
    }
    piece.copied.record(stream_.get());
    piece.is_in_flight = true;
  }
}

void Uploader::matrix(const float* values, int64_t rows, int64_t columns, Bf16* to,
                      int64_t row_stride) {
  const auto width = static_cast<size_t>(columns);
  upload(rows, width * sizeof(Bf16), to, static_cast<size_t>(row_stride) * sizeof(Bf16),
         [&](int64_t row, int64_t count, std::byte* piece) {
           const float* from = values + row * columns;
           auto* rounded = reinterpret_cast<Bf16*>(piece);
           for (int64_t i = 0; i < count * columns; ++i)
             rounded[i] = to_bf16(from[i]);
         });
}

std::vector<float> Uploader::quantised(const float* values, int64_t rows, int64_t columns, E4m3* to,
                                       int64_t row_stride) {
  std::vector<float> scales(static_cast<size_t>(rows));
  upload(rows, static_cast<size_t>(columns), to, static_cast<size_t>(row_stride),
         [&](int64_t row, int64_t count, std::byte* piece) {
           auto* codes = reinterpret_cast<E4m3*>(piece);
           for (int64_t i = row; i < row + count; ++i) {
             const float* from = values + i * columns;
             float most = 0;
             for (int64_t k = 0; k < columns; ++k)
               most = std::max(most, absolute(from[k]));
             const float scale = e4m3_scale(most);
             scales[static_cast<size_t>(i)] = scale;
             for (int64_t k = 0; k < columns; ++k)
               *codes++ = to_e4m3(from[k] * (1.0f / scale));
           }
         });
  return scales;
}

void Uploader::codes(const uint8_t* codes, int64_t code_stride, int64_t rows, int64_t columns,
                     E4m3* to, int64_t row_stride) {
  const auto width = static_cast<size_t>(columns);
  upload(rows, width, to, static_cast<size_t>(row_stride),
         [&](int64_t row, int64_t count, std::byte* piece) {
           for (int64_t i = 0; i < count; ++i)
             std::memcpy(piece + i * columns, codes + (row + i) * code_stride, width);
         });
}

void Uploader::vector(const float* values, int64_t count, float* to, int64_t stride) {
  upload(count, sizeof(float), to, static_cast<size_t>(stride) * sizeof(float),
         [&](int64_t row, int64_t rows, std::byte* piece) {
           std::memcpy(piece, values + row, static_cast<size_t>(rows) * sizeof(float));
         });
}

void Uploader::raw(const void* values, size_t bytes, void* to) {
  upload(static_cast<int64_t>(bytes), 1, to, 1, [&](int64_t row, int64_t rows, std::byte* piece) {
    std::memcpy(piece, static_cast<const std::byte*>(values) + row, static_cast<size_t>(rows));
  });
}

void Uploader::finish() {
  FP_CUDA(cudaSetDevice(device_));
  stream_.synchronize();
}

}  // namespace flowprefill
