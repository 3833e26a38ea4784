// ProductShares: every part of a product in one share, for any columns, rows and team; what is left
// over for a team is cut by rows.
#include "devices/cpu/product_shares.h"

#include <gtest/gtest.h>

#include <vector>

namespace flowprefill {
namespace {

TEST(ProductSharesTest, EveryPartIsInOneShare) {
  for (const int32_t threads : {1, 2, 3, 16}) {
    for (const int32_t rows : {1, 17, 64, 65, 250, 256, 2048}) {
      for (const int64_t blocks : {1, 2, 9, 15, 48, 768}) {
        for (const bool cuts_rows : {false, true}) {
          const int64_t begin = 5;
          const ProductShares shares(begin, begin + blocks, rows, threads, cuts_rows);
          std::vector<int> seen(static_cast<size_t>(blocks * rows));
          for (int64_t i = 0; i < shares.size(); ++i) {
            const ProductShare share = shares[i];
            ASSERT_LT(share.first, share.last);
            ASSERT_LT(share.begin, share.end);
            EXPECT_TRUE(cuts_rows || share.end - share.begin == rows);
            EXPECT_EQ(share.begin % kRowStep, 0);
            for (int64_t block = share.first; block < share.last; ++block) {
              for (int32_t row = share.begin; row < share.end; ++row)
                ++seen.at(static_cast<size_t>((block - begin) * rows + row));
            }
          }
          for (const int times : seen)
            ASSERT_EQ(times, 1) << threads << " threads, " << rows << " rows, " << blocks;
        }
      }
    }
  }
}

// Parts that a thread computes if each takes the next share when it has done its own.
int64_t longest_of(const ProductShares& shares, int32_t threads) {
  std::vector<int64_t> taken(static_cast<size_t>(threads));
  for (int64_t i = 0; i < shares.size(); ++i) {
    const ProductShare share = shares[i];
    *std::min_element(taken.begin(), taken.end()) +=
        (share.last - share.first) * (share.end - share.begin);
  }
  return *std::max_element(taken.begin(), taken.end());
}

TEST(ProductSharesTest, OddBlocksAreCutByRows) {
  for (const int64_t blocks : {9, 15}) {
    EXPECT_EQ(longest_of({0, blocks, 256, 2, true}, 2), blocks * 256 / 2);
    EXPECT_EQ(longest_of({0, blocks, 256, 2, false}, 2), (blocks + 1) / 2 * 256);
  }
  EXPECT_EQ(longest_of({0, 9, 2048, 16, true}, 16), 9 * 2048 / 16);
}

TEST(ProductSharesTest, FewRowsAreNotCut) {
  const ProductShares shares(0, 9, 63, 2, true);
  for (int64_t i = 0; i < shares.size(); ++i)
    EXPECT_EQ(shares[i].end - shares[i].begin, 63);
}

}  // namespace
}  // namespace flowprefill
