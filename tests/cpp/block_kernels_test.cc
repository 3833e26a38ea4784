// Tests of quantised blocks: every format packed, unpacked and multiplied by every instruction
// set's kernels, against plain readers of the file's layout.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "devices/cpu/block_matrix.h"
#include "devices/cpu/isa.h"
#include "devices/cpu/row_kernel_tables.h"

namespace flowprefill {

namespace {

struct Level {
  const char* name;
  const RowKernels<float>* f32;
  const RowKernels<Bf16>* bf16;
};

std::vector<Level> levels() {
  std::vector<Level> found{
      {"baseline", &isa_baseline::kRowKernelsF32, &isa_baseline::kRowKernelsBf16}};
#if FP_ISA_LEVELS > 1
  if (available_isas().back() >= Isa::kAvx2)
    found.push_back({"avx2", &isa_avx2::kRowKernelsF32, &isa_avx2::kRowKernelsBf16});
  if (available_isas().back() >= Isa::kAvx512)
    found.push_back({"avx512", &isa_avx512::kRowKernelsF32, &isa_avx512::kRowKernelsBf16});
  if (available_isas().back() >= Isa::kAvx512Bf16) {
    found.push_back(
        {"avx512bf16", &isa_avx512bf16::kRowKernelsF32, &isa_avx512bf16::kRowKernelsBf16});
  }
#endif
  return found;
}

double half_at(const uint8_t* at) {
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  const int exponent = bits >> 10 & 31;
  const int fraction = bits & 1023;
  const double size =
      exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return (bits & 0x8000) != 0 ? -size : size;
}

double nibble(const uint8_t* at, int i) {
  return at[i % 16] >> (i < 16 ? 0 : 4) & 15;
}

// Value i of a block of 32, read as the format's definition has it.
double small_value(BlockFormat format, const uint8_t* b, int i) {
  const auto fifth = [i](const uint8_t* bits) { return 16.0 * (bits[i / 8] >> (i % 8) & 1); };
  switch (format) {
    case BlockFormat::kQ4_0:
      return half_at(b) * (nibble(b + 2, i) - 8);
    case BlockFormat::kQ4_1:
      return half_at(b) * nibble(b + 4, i) + half_at(b + 2);
    case BlockFormat::kQ5_0:
      return half_at(b) * (nibble(b + 6, i) + fifth(b + 2) - 16);
    case BlockFormat::kQ5_1:
      return half_at(b) * (nibble(b + 8, i) + fifth(b + 4)) + half_at(b + 2);
    default:  // Q8_0
      return half_at(b) * static_cast<int8_t>(b[2 + i]);
  }
}

// Of a block of 256.
double large_value(BlockFormat format, const uint8_t* b, int i) {
  if (format == BlockFormat::kQ6K) {
    const int in_half = i % 128;  // a byte of ql serves two of four runs of 32 values
    const int low = b[i / 128 * 64 + in_half % 64] >> (in_half < 64 ? 0 : 4) & 15;
    const int high = b[128 + i / 128 * 32 + i % 32] >> (in_half / 32 * 2) & 3;
    return half_at(b + 208) * static_cast<int8_t>(b[192 + i / 16]) * (low + 16 * high - 32);
  }
  const uint8_t* packed = b + 4;
  const int run = i / 32;
  const int scale = run < 4 ? packed[run] & 63 : (packed[run + 4] & 15) | packed[run - 4] >> 6 << 4;
  const int minimum = run < 4 ? packed[run + 4] & 63 : packed[run + 4] >> 4 | packed[run] >> 6 << 4;
  const bool is_five = format == BlockFormat::kQ5K;
  int quant = b[(is_five ? 48 : 16) + i / 64 * 32 + i % 32] >> (run % 2 * 4) & 15;
  if (is_five)
    quant += (b[16 + i % 32] >> run & 1) * 16;
  return half_at(b) * scale * quant - half_at(b + 2) * minimum;
}

// Rows of valid random blocks, and their values.
struct Tensor {
  Tensor(BlockFormat format, int64_t rows, int64_t depth)
      : bytes(static_cast<size_t>(rows * block_row_bytes(format, depth))) {
    std::mt19937 random(7);
    for (uint8_t& byte : bytes)
      byte = static_cast<uint8_t>(random());
    const BlockLayout& layout = layout_of(format);
    for (size_t at = 0; at < bytes.size(); at += static_cast<size_t>(layout.bytes())) {
      uint8_t* block = bytes.data() + at;
      const bool is_last = format == BlockFormat::kQ6K;
      for (int field = 0; field < (layout.scale_bytes == 2 || is_last ? 1 : 2); ++field) {
        uint8_t* upper = block + (is_last ? 208 : 2 * field) + 1;
        *upper = static_cast<uint8_t>((*upper & 0x83) | (random() % 8 << 2));  // none is huge
      }
      for (int i = 0; i < layout.depth; ++i) {
        values.push_back(layout.depth == 32 ? small_value(format, block, i)
                                            : large_value(format, block, i));
      }
    }
  }
  std::vector<uint8_t> bytes;
  std::vector<double> values;  // [rows, depth]
};

float as_float(Bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
Bf16 rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<Bf16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

class BlockKernelsTest : public testing::TestWithParam<std::tuple<Level, BlockLayout>> {
 protected:
  static constexpr int64_t kDepth = 512;
  static constexpr int64_t kRows = 32;

  BlockKernelsTest()
      : format_(block_format_of(std::get<1>(GetParam()).name)),
        tensor_(format_, kRows, kDepth),
        matrix_(kDepth, {format_, format_}) {
    Team team(2);
    matrix_.pack({format_, tensor_.bytes.data()}, kRows, team, column_of);
  }
  static int64_t column_of(int64_t row) { return row ^ 5; }
  // Of a column of the second strip.
  double value(int64_t k, int c) const {
    return tensor_.values[static_cast<size_t>(column_of(16 + c) * kDepth + k)];
  }
  const Level& level() const { return std::get<0>(GetParam()); }
  template <typename T>
  void expect_sums_of_few_rows(const RowKernels<T>& kernels) const;

  BlockFormat format_;
  Tensor tensor_;
  BlockMatrix matrix_;
};

template <typename T>
void BlockKernelsTest::expect_sums_of_few_rows(const RowKernels<T>& kernels) const {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  constexpr int kCount = 13;  // tiles of every height
  std::vector<float> a(kCount * kDepth);
  std::vector<std::byte> prepared(kCount * few_row_bytes(kDepth));
  for (int r = 0; r < kCount; ++r) {
    std::vector<T> row;
    for (int64_t k = 0; k < kDepth; ++k) {
      const Bf16 exact = rounded(normal(random));
      a[static_cast<size_t>(r * kDepth + k)] = as_float(exact);
      if constexpr (sizeof(T) == sizeof(Bf16))
        row.push_back(exact);
      else
        row.push_back(as_float(exact));
    }
    kernels.prepare_few(row.data(), kDepth, prepared.data() + r * few_row_bytes(kDepth));
  }
  std::vector<float> out(kCount * 16);
  const auto multiply = [&](int first, int count, float* to) {
    const FewRows rows{prepared.data() + first * few_row_bytes(kDepth), few_row_bytes(kDepth),
                       count};
    kernels.multiply_few(format_, matrix_.strip(1), kDepth, rows, to);
  };
  multiply(0, kCount, out.data());
  for (int r = 0; r < kCount; ++r) {
    std::vector<float> alone(16);
    multiply(r, 1, alone.data());
    for (int c = 0; c < 16; ++c) {
      double sum = 0;
      double size = 0;
      for (int64_t k = 0; k < kDepth; ++k) {
        const double product = value(k, c) * a[static_cast<size_t>(r * kDepth + k)];
        sum += product;
        size += std::fabs(product);
      }
      EXPECT_NEAR(out[static_cast<size_t>(r * 16 + c)], sum, 2e-6 * size);
      EXPECT_EQ(out[static_cast<size_t>(r * 16 + c)], alone[static_cast<size_t>(c)])
          << "row " << r << " depends on its neighbours";
    }
  }
}

TEST_P(BlockKernelsTest, UnpacksExactValues) {
  for (const auto& [begin, end] : {std::pair{0, 512}, {32, 64}, {224, 320}}) {
    std::vector<float> out(static_cast<size_t>((end - begin) * 20), -1.0f);
    level().f32->unpack(format_, matrix_.strip(1), begin, end, out.data(), 20);
    for (int64_t k = begin; k < end; ++k) {
      for (int c = 0; c < 16; ++c) {
        ASSERT_EQ(out[static_cast<size_t>((k - begin) * 20 + c)], static_cast<float>(value(k, c)))
            << "depth " << k << ", column " << c;
      }
      EXPECT_EQ(out[static_cast<size_t>((k - begin) * 20 + 16)], -1.0f) << "beyond the strip";
    }
  }
}

TEST_P(BlockKernelsTest, UnpacksPairsRoundedToNearestEven) {
  std::vector<Bf16> out(512 * 48, 7);
  level().bf16->unpack(format_, matrix_.strip(1), 0, 512, out.data(), 48);
  for (int64_t k = 0; k < 512; ++k) {
    for (int c = 0; c < 16; ++c) {
      const Bf16 got = out[static_cast<size_t>((k / 2 * 48 + c) * 2 + k % 2)];
      ASSERT_EQ(as_float(got), as_float(rounded(static_cast<float>(value(k, c)))));
    }
    EXPECT_EQ(out[static_cast<size_t>((k / 2 * 48 + 16) * 2)], 7) << "beyond the strip";
  }
}

TEST_P(BlockKernelsTest, AFewRowsTimesAStripAreTheSumsInDouble) {
  expect_sums_of_few_rows(*level().f32);
}

TEST_P(BlockKernelsTest, AFewRowsOfBf16TimesAStripAreTheSumsInDouble) {
  expect_sums_of_few_rows(*level().bf16);
}

INSTANTIATE_TEST_SUITE_P(EveryIsaAndFormat, BlockKernelsTest,
                         testing::Combine(testing::ValuesIn(levels()),
                                          testing::ValuesIn(kBlockLayouts)),
                         [](const auto& of) {
                           return std::string(std::get<0>(of.param).name) + "_" +
                                  std::get<1>(of.param).name;
                         });

TEST(BlockFormats, NamesAndDepthsThatDoNotExistAreNamed) {
  EXPECT_EQ(block_format_of("Q6_K"), BlockFormat::kQ6K);
  EXPECT_THROW(block_format_of("IQ2_XS"), std::invalid_argument);
  EXPECT_EQ(block_row_bytes(BlockFormat::kQ4K, 512), 288);
  EXPECT_THROW(block_row_bytes(BlockFormat::kQ4K, 288), std::invalid_argument);
}

}  // namespace
}  // namespace flowprefill
