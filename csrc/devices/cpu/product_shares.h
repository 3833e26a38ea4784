// ProductShares: how the columns and rows of one product are shared out to the compute team. Used
// by CpuProgram.
#pragma once

#include <algorithm>
#include <cstdint>

namespace flowprefill {

// The product's row block; so few a member reach 97 % of the peak.
inline constexpr int32_t kRowStep = 16;

// Blocks [first, last) of a product's columns, rows [begin, end) of its step.
struct ProductShare {
  int64_t first;
  int64_t last;
  int32_t begin;
  int32_t end;
};

// Blocks [begin, end) of a product for a team: a long share for each thread, for weights that
// follow each other can be asked for ahead, then single blocks, by which they end together. Those
// that would leave threads idle are cut by rows. Every part of the product is in one share.
class ProductShares {
 public:
  // cuts_rows: whether rows may be in different shares.
  ProductShares(int64_t begin, int64_t end, int32_t rows, int32_t threads, bool cuts_rows)
      : begin_(begin),
        threads_(threads),
        long_((end - begin) * 7 / 8 / threads),
        rows_(rows),
        pieces_(cuts_rows ? std::clamp(rows / kLeastRows, 1, threads) : 1) {
    const int64_t singles = end - begin - long_ * threads;
    whole_ = pieces_ > 1 ? singles / threads * threads : singles;
    cut_ = singles - whole_;
  }

  int64_t size() const { return num_long() + whole_ + cut_ * pieces_; }
  ProductShare operator[](int64_t i) const {
    if (i < num_long())
      return {begin_ + i * long_, begin_ + (i + 1) * long_, 0, rows_};
    const int64_t single = i - num_long();
    const int64_t first = begin_ + long_ * threads_;
    if (single < whole_)
      return {first + single, first + single + 1, 0, rows_};
    const int64_t block = first + whole_ + (single - whole_) / pieces_;
    const auto piece = static_cast<int32_t>((single - whole_) % pieces_);
    return {block, block + 1, rows_before(piece), rows_before(piece + 1)};
  }

 private:
  // So many at least in a piece, which reads its block's weights for them alone.
  static constexpr int32_t kLeastRows = 32;

  int64_t num_long() const { return long_ == 0 ? 0 : threads_; }
  int32_t rows_before(int32_t piece) const {
    return piece == pieces_ ? rows_ : rows_ / pieces_ / kRowStep * kRowStep * piece;
  }

  const int64_t begin_;
  const int32_t threads_;
  const int64_t long_;  // blocks of a long share
  const int32_t rows_;
  const int32_t pieces_;  // of a block that is cut by rows
  int64_t whole_;         // single blocks that are not cut
  int64_t cut_;
};

}  // namespace flowprefill
