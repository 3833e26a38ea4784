// few_rows_body() on the host, against sums in double: every number of rows, every epilogue, sizes
// that fill no block, no step and no turn of the warps; of bf16 and of e4m3.
#include "devices/cuda/kernels/gemm_few_rows_body.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "reference.h"
#include "simt.h"

namespace flowprefill {
namespace {

struct Case {
  int32_t rows = 5;
  int32_t columns = 48;
  int32_t depth = 200;
  bool is_float = true;
  bool has_bias = false;
  bool adds_to_d = false;
  bool is_gated = false;
  bool is_gelu = false;
  float scale = 1;
  bool is_fp8 = false;
  bool has_scales = true;  // where FP8
};

// Fewer blocks than units of columns, so that some take several.
constexpr int32_t kBlocks = 2;

template <int kTiles>
void run_body(const GemmArgs& args, uint32_t seed) {
  using Form = FewRowsForm<kTiles>;
  const int32_t units = (args.columns + Form::kColumns - 1) / Form::kColumns;
  const simt::Grid grid{.x = smaller(units, kBlocks),
                        .threads = kFewRowsThreads,
                        .shared_bytes = Form::kSharedBytes,
                        .seed = seed,
                        .overlaps = true};
  simt::launch(grid, [&](const simt::Thread& t) {
    const FusedProduct fused{args};
    if (args.is_fp8())
      few_rows_body<kTiles, E4m3, false, false>(t, fused);
    else
      few_rows_body<kTiles, Bf16, false, false>(t, fused);
  });
}

void run(const GemmArgs& args, uint32_t seed) {
  check_tile(args, GemmTile::kFewRows);
  if (args.rows() <= 8)
    run_body<1>(args, seed);
  else
    run_body<2>(args, seed);
}

// A product with a row before it and one behind, which are neither read nor written.
class Product {
 public:
  explicit Product(const Case& of, uint32_t seed = 1)
      : of_(of), lda_(of.depth + (of.is_fp8 ? 16 : 8)), ldb_(of.depth + 16), random_(seed) {
    fill(&a_, (of.rows + 2) * lda_);
    fill(&b_, of.columns * ldb_);
    for (int64_t i = 0; i < lda_; ++i)
      a_[static_cast<size_t>(i)] = a_[a_.size() - 1 - static_cast<size_t>(i)] = kNan;
    for (int32_t i = 0; i < of.columns; ++i)
      bias_.push_back(normal_(random_));
    row_scales_.assign(static_cast<size_t>(of.rows + 2), of.has_scales ? std::nanf("") : 1);
    column_scales_.assign(static_cast<size_t>(of.columns), 1);
    if (of.is_fp8 && of.has_scales) {
      for (size_t i = 1; i + 1 < row_scales_.size(); ++i)
        row_scales_[i] = 0.1f + std::abs(normal_(random_));
      for (float& scale : column_scales_)
        scale = 0.1f + std::abs(normal_(random_));
    }
    for (int64_t i = 0; i < (of.rows + 2) * ldd(); ++i)
      floats_.push_back(normal_(random_));
    for (const float value : floats_)
      halves_.push_back(to_bf16(value));
    floats_before_ = floats_;
    halves_before_ = halves_;
  }

  int64_t ldd() const { return d_columns() + 8; }
  int32_t d_columns() const { return of_.is_gated ? of_.columns / 2 : of_.columns; }

  GemmArgs args() {
    Fp8Operands fp8;
    if (of_.is_fp8) {
      a_codes_ = codes(a_);
      b_codes_ = codes(b_);
      fp8 = {.b = b_codes_.data(),
             .b_scales = column_scales_.data(),
             .a = a_codes_.data(),
             .a_scales = of_.has_scales ? row_scales_.data() : nullptr};
    }
    return {.a = of_.is_fp8 ? nullptr : a_.data(),
            .lda = lda_,
            .b = of_.is_fp8 ? nullptr : b_.data(),
            .fp8 = fp8,
            .ldb = ldb_,
            .bias = of_.has_bias ? bias_.data() : nullptr,
            .d = of_.is_float ? static_cast<void*>(floats_.data()) : halves_.data(),
            .ldd = ldd(),
            .output = of_.is_float ? GemmOutput::kFloat : GemmOutput::kBf16,
            .adds_to_d = of_.adds_to_d,
            .is_gated = of_.is_gated,
            .is_gelu = of_.is_gelu,
            .scale = of_.scale,
            .row_begin = 1,
            .row_end = 1 + of_.rows,
            .columns = of_.columns,
            .depth = of_.depth};
  }

  void test() {
    run(args(), 1);
    for (int32_t row = 0; row < of_.rows + 2; ++row) {
      for (int32_t column = 0; column < ldd(); ++column)
        ASSERT_NO_FATAL_FAILURE(test_at(row, column)) << "row " << row << ", column " << column;
    }
  }

  // The same with a NaN in one row, which is NaN then.
  void test_nan_in_row(int32_t row) {
    a_[static_cast<size_t>(row * lda_ + of_.depth / 2)] = kNan;
    run(args(), 1);
    for (int32_t i = 1; i <= of_.rows; ++i) {
      for (int32_t column = 0; column < d_columns(); ++column)
        ASSERT_EQ(std::isnan(floats_[static_cast<size_t>(i * ldd() + column)]), i == row);
    }
  }

  // d in full after the whole product, or after it in slices of columns and rows.
  std::vector<float> whole() {
    restore();
    run(args(), 2);
    return floats_;
  }
  std::vector<float> cut(int32_t rows, int32_t columns) {
    restore();
    for (int32_t row = 0; row < of_.rows; row += rows) {
      for (int32_t column = 0; column < of_.columns; column += columns) {
        GemmArgs part = args();
        if (of_.is_fp8) {
          part.fp8.b += column * ldb_;
          part.fp8.b_scales += column;
        } else {
          part.b += column * ldb_;
        }
        part.bias = of_.has_bias ? part.bias + column : nullptr;
        part.d = floats_.data() + column;
        part.columns = smaller(columns, of_.columns - column);
        part.row_begin = 1 + row;
        part.row_end = 1 + smaller(row + rows, of_.rows);
        run(part, 3);
      }
    }
    return floats_;
  }

 private:
  static constexpr Bf16 kNan = 0x7fc1;

  void restore() { floats_ = floats_before_; }
  void fill(std::vector<Bf16>* matrix, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
      matrix->push_back(to_bf16(of_.is_fp8 ? widen(to_e4m3(normal_(random_))) : normal_(random_)));
    // Behind the depth of a row there is nothing that may count.
    const int64_t ld = matrix == &a_ ? lda_ : ldb_;
    for (int64_t i = 0; i < count; ++i) {
      if (i % ld >= of_.depth)
        (*matrix)[static_cast<size_t>(i)] = kNan;
    }
  }

  // Exact.
  static std::vector<E4m3> codes(const std::vector<Bf16>& values) {
    std::vector<E4m3> out;
    for (const Bf16 value : values)
      out.push_back(to_e4m3(widen(value)));
    return out;
  }

  // A column of the bare product with its bias.
  double sum(int32_t row, int32_t column) const {
    double scale = of_.scale;
    if (of_.is_fp8)
      scale *= double{row_scales_[static_cast<size_t>(row)]} *
               column_scales_[static_cast<size_t>(column)];
    double sum = of_.has_bias ? bias_[static_cast<size_t>(column)] : 0.0;
    for (int32_t k = 0; k < of_.depth; ++k) {
      sum += scale * widen(a_[static_cast<size_t>(row * lda_ + k)]) *
             widen(b_[static_cast<size_t>(column * ldb_ + k)]);
    }
    return sum;
  }

  void test_at(int32_t row, int32_t column) const {
    const auto at = static_cast<size_t>(row * ldd() + column);
    const double before = of_.is_float ? floats_before_[at] : widen(halves_before_[at]);
    const double got = of_.is_float ? floats_[at] : widen(halves_[at]);
    if (row == 0 || row > of_.rows || column >= d_columns()) {
      ASSERT_EQ(got, before) << "written outside";
      return;
    }
    double want = 0;
    if (of_.is_gated) {
      const double gate = sum(row, 2 * column);
      want =
          (of_.is_gelu ? reference::gelu(gate) : reference::silu(gate)) * sum(row, 2 * column + 1);
    } else {
      want = sum(row, column) + (of_.adds_to_d ? before : 0.0);
    }
    ASSERT_NEAR(got, want, std::abs(want) * (of_.is_float ? 1e-6 : 1.0 / 256) + 1e-3);
  }

  const Case of_;
  const int64_t lda_, ldb_;
  std::mt19937 random_;
  std::normal_distribution<float> normal_;
  std::vector<Bf16> a_, b_;
  std::vector<E4m3> a_codes_, b_codes_;
  std::vector<float> row_scales_, column_scales_;
  std::vector<float> bias_, floats_, floats_before_;
  std::vector<Bf16> halves_, halves_before_;
};

TEST(FewRows, EveryNumberOfRows) {
  for (int32_t rows = 1; rows <= kMostFewRows; ++rows)
    Product({.rows = rows}).test();
  for (int32_t rows = 1; rows <= kMostFewRows; ++rows)
    Product({.rows = rows, .depth = 208, .is_fp8 = true}).test();
}

TEST(FewRows, SizesThatFillNoBlockNoStepAndNoTurn) {
  for (const int32_t columns : {8, 32, 72})
    Product({.rows = 3, .columns = columns, .depth = 64}).test();
  for (const int32_t depth : {8, 32, 56, 64, 72, 512, 520, 1032, 1600})
    Product({.rows = 9, .columns = 8, .depth = depth}).test();
  for (const int32_t columns : {16, 32, 80})
    Product({.rows = 3, .columns = columns, .depth = 128, .is_fp8 = true}).test();
  for (const int32_t depth : {16, 64, 112, 128, 144, 1024, 1040, 2064, 3200})
    Product({.rows = 9, .columns = 16, .depth = depth, .is_fp8 = true}).test();
}

void test_every_epilogue(Case of) {
  const auto test = [&of](auto... change) {
    Case changed = of;
    (change(&changed), ...);
    Product(changed).test();
  };
  const auto biased = [](Case* c) { c->has_bias = true; };
  const auto scaled = [](Case* c) { c->scale = 0.25f; };
  const auto added = [](Case* c) { c->adds_to_d = true; };
  const auto gated = [](Case* c) { c->is_gated = true; };
  const auto gelu = [](Case* c) { c->is_gelu = true; };
  for (const bool is_float : {true, false}) {
    of.is_float = is_float;
    test(biased, scaled);
    test(added);
    test(biased, added);
  }
  test(gated);
  test(gated, biased, gelu);
}

TEST(FewRows, EveryEpilogue) {
  for (const int32_t rows : {2, 11}) {
    test_every_epilogue({.rows = rows});
    test_every_epilogue({.rows = rows, .depth = 208, .is_fp8 = true});
  }
  Product({.depth = 208, .is_fp8 = true, .has_scales = false}).test();
}

TEST(FewRows, ANanAmongTheCodesOfARowMakesThatRowNan) {
  for (const int32_t rows : {5, 16})
    Product({.rows = rows, .depth = 208, .is_fp8 = true}).test_nan_in_row(3);
}

// Decode steps of other batch sizes, slices of rows and of columns: the bits of the whole.
TEST(FewRows, BitsDependOnNoSlice) {
  Case of = {.rows = 13, .columns = 96, .depth = 704, .has_bias = true, .adds_to_d = true};
  for (const bool is_fp8 : {false, true}) {
    of.is_fp8 = is_fp8;
    Product product(of);
    const std::vector<float> want = product.whole();
    EXPECT_EQ(product.cut(1, 96), want);
    EXPECT_EQ(product.cut(7, is_fp8 ? 48 : 40), want);
    EXPECT_EQ(product.cut(13, is_fp8 ? 16 : 8), want);
  }
}

}  // namespace
}  // namespace flowprefill
