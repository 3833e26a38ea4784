// simt itself: that it computes what the instructions compute, and that it notices what the kernel
// tests rely on it to notice.
#include "simt.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "devices/cuda/kernels/mma_layout.h"
#include "devices/cuda/kernels/thread.h"

namespace flowprefill {
namespace {

using simt::Thread;

TEST(Simt, RunsEveryThreadOfEveryBlockOnce) {
  std::multiset<std::array<int32_t, 3>> seen;
  simt::launch({.x = 3, .y = 2, .threads = 64}, [&](const Thread& t) {
    EXPECT_EQ(t.count(), 64);
    EXPECT_EQ(t.warp() * 32 + t.lane(), t.index());
    seen.insert({t.block_x(), t.block_y(), t.index()});
  });
  EXPECT_EQ(seen.size(), 3u * 2 * 64);
  EXPECT_EQ(std::set(seen.begin(), seen.end()).size(), seen.size());
}

TEST(Simt, SumsOverABlockWithTheSameBitsEverywhere) {
  std::vector<float> sums(96);
  simt::launch({.threads = 96, .shared_bytes = 12}, [&](const Thread& t) {
    sums[static_cast<size_t>(t.index())] =
        block_sum(t, static_cast<float>(t.index()), t.shared<float>());
  });
  for (const float sum : sums)
    EXPECT_EQ(sum, 95.0f * 96 / 2);
}

TEST(Simt, MultipliesMatrices) {
  // a[r][k] = r + k, b[k][n] = k - n: small integers, exact in bf16.
  simt::launch({}, [](const Thread& t) {
    const auto pair = [](int32_t low, int32_t high) {
      return pack_bf16(static_cast<float>(low), static_cast<float>(high));
    };
    uint32_t a[4];
    for (int32_t i = 0; i < 4; ++i) {
      const int32_t sum = a_row(t.lane(), i) + a_column(t.lane(), i);
      a[i] = pair(sum, sum + 1);
    }
    uint32_t b[2];
    for (int32_t i = 0; i < 2; ++i) {
      const int32_t difference = b_row(t.lane(), i) - b_column(t.lane());
      b[i] = pair(difference, difference + 1);
    }
    float c[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    t.multiply_add(c, a, b[0], b[1]);
    for (int32_t i = 0; i < 4; ++i) {
      int32_t want = 1;
      for (int32_t k = 0; k < 16; ++k)
        want += (c_row(t.lane(), i) + k) * (k - c_column(t.lane(), i));
      EXPECT_EQ(c[i], static_cast<float>(want));
    }
  });
}

TEST(Simt, LoadsMatricesPlainAndTransposed) {
  simt::launch({.shared_bytes = 512}, [](const Thread& t) {
    auto* rows = t.shared<Bf16>();  // 4 matrices of 8 rows of 8: element value = its index
    for (int32_t i = 0; i < 8; ++i)
      rows[t.lane() * 8 + i] = static_cast<Bf16>(t.lane() * 8 + i);
    t.sync();
    uint32_t plain[4];
    uint32_t transposed[4];
    t.load_matrices(rows + t.lane() * 8, plain);
    t.load_matrices_transposed(rows + t.lane() * 8, transposed);
    const auto major = static_cast<uint32_t>(t.lane() / 4);
    const auto minor = static_cast<uint32_t>(t.lane() % 4 * 2);
    for (uint32_t m = 0; m < 4; ++m) {
      const uint32_t row = m * 64 + major * 8 + minor;
      EXPECT_EQ(plain[m], row | (row + 1) << 16);
      const uint32_t column = m * 64 + minor * 8 + major;
      EXPECT_EQ(transposed[m], column | (column + 8) << 16);
    }
  });
}

TEST(Simt, SharedMemoryStartsAsNan) {
  simt::launch({.shared_bytes = 128},
               [](const Thread& t) { EXPECT_TRUE(std::isnan(t.shared<float>()[t.lane()])); });
}

TEST(Simt, ACopyArrivesAtItsWaitAndNotBefore) {
  alignas(16) const float from[4] = {1, 2, 3, 4};
  simt::launch({.shared_bytes = 32}, [&](const Thread& t) {
    if (t.index() != 0)
      return;
    auto* shared = t.shared<float>();
    t.copy_16(shared, from, true);
    t.copy_16(shared + 4, from, false);
    EXPECT_TRUE(std::isnan(shared[0]));
    t.wait_for_copies();
    EXPECT_EQ(shared[2], 3.0f);
    EXPECT_EQ(shared[6], 0.0f);
  });
}

TEST(Simt, AddsOneAfterTheOtherAndOnlyInside) {
  std::multiset<uint32_t> before;
  simt::launch({.threads = 64, .shared_bytes = 8}, [&](const Thread& t) {
    auto* shared = t.shared<uint32_t>();
    if (t.index() == 0)
      shared[1] = 5;
    t.sync();
    before.insert(t.add(shared + 1, 2));
    EXPECT_THROW(t.add(shared + 2, 1), simt::Violation);
  });
  EXPECT_EQ(before.size(), 64u);
  EXPECT_EQ(std::set(before.begin(), before.end()).size(), 64u);
  EXPECT_EQ(*before.begin(), 5u);
  EXPECT_EQ(*before.rbegin(), 5u + 2 * 63);
}

TEST(Simt, AWaitForGroupsLeavesTheLastOnesUnderWay) {
  alignas(16) const float from[4] = {1, 2, 3, 4};
  simt::launch({.shared_bytes = 64}, [&](const Thread& t) {
    if (t.index() != 0)
      return;
    auto* shared = t.shared<float>();
    for (int i = 0; i < 4; ++i) {
      t.copy_16(shared + 4 * i, from, true);
      if (i < 3)
        t.end_copies();
    }
    t.wait_for_copies_but<1>();
    EXPECT_EQ(shared[0], 1.0f);
    EXPECT_EQ(shared[4], 1.0f);
    EXPECT_TRUE(std::isnan(shared[8]));
    t.wait_for_copies_but<0>();
    EXPECT_EQ(shared[8], 1.0f);
    EXPECT_TRUE(std::isnan(shared[12])) << "its group is not ended";
    t.wait_for_copies();
    EXPECT_EQ(shared[12], 1.0f);
  });
}

TEST(Simt, GroupsOfCopiesArriveInTheirOrder) {
  alignas(16) static constexpr uint16_t kFrom[3][8] = {{1}, {2}, {3}};
  simt::launch({.shared_bytes = 32 * 3 * 16}, [](const Thread& t) {
    auto* to = t.shared<uint16_t>() + t.lane() * 24;
    const auto arrived = [&] {
      return int{to[0] == 1} + 2 * int{to[8] == 2} + 4 * int{to[16] == 3};
    };
    t.copy_16(to, kFrom[0], true);
    t.end_copies();
    t.copy_16(to + 8, kFrom[1], true);
    t.end_copies();
    t.copy_16(to + 16, kFrom[2], true);
    t.wait_for_copies_but<2>();
    EXPECT_EQ(arrived(), 0);
    t.end_copies();
    t.wait_for_copies_but<2>();
    EXPECT_EQ(arrived(), 1);
    t.end_copies();  // an empty one counts
    t.wait_for_copies_but<2>();
    EXPECT_EQ(arrived(), 3);
    t.wait_for_copies_but<0>();
    EXPECT_EQ(arrived(), 7);
    t.sync_warp();
  });
}

TEST(Simt, AMissingBarrierShows) {
  // Without sync() between write and read some order of threads reads NaN.
  int wrong = 0;
  for (uint32_t seed = 1; seed <= 4; ++seed) {
    simt::launch({.threads = 64, .shared_bytes = 256, .seed = seed}, [&](const Thread& t) {
      auto* shared = t.shared<float>();
      shared[t.index()] = 1.0f;
      wrong += std::isnan(shared[63 - t.index()]);
    });
  }
  EXPECT_GT(wrong, 0);
}

TEST(Simt, AWarpMayRunAheadUpToABarrier) {
  // Only a barrier keeps the second warp from reading what the first has not written yet, even
  // where both make the same collective calls on the way.
  int wrong = 0;
  for (uint32_t seed = 1; seed <= 8; ++seed) {
    simt::launch({.threads = 64, .shared_bytes = 256, .seed = seed}, [&](const Thread& t) {
      auto* shared = t.shared<float>();
      shared[t.index()] = t.shuffle_xor(1.0f, 1);
      wrong += std::isnan(shared[t.shuffle_xor(63 - t.index(), 0)]);
    });
  }
  EXPECT_GT(wrong, 0);
}

TEST(Simt, RefusesDivergentCollectives) {
  EXPECT_THROW(simt::launch({},
                            [](const Thread& t) {
                              if (t.lane() < 16)
                                t.sync();
                            }),
               simt::Violation);
  EXPECT_THROW(simt::launch({},
                            [](const Thread& t) {
                              if (t.lane() < 16) {
                                t.sync();
                              } else {
                                t.shuffle_xor(1.0f, 1);
                              }
                            }),
               simt::Violation);
  EXPECT_THROW(simt::launch({.threads = 64},
                            [](const Thread& t) {
                              if (t.warp() == 0)
                                t.sync();
                            }),
               simt::Violation);
}

TEST(Simt, RefusesAddressesOutsideOfSharedMemory) {
  alignas(16) const float from[4] = {};
  EXPECT_THROW(simt::launch({.shared_bytes = 16},
                            [&](const Thread& t) { t.copy_16(t.shared<float>() + 4, from, true); }),
               simt::Violation);
  EXPECT_THROW(simt::launch({.shared_bytes = 32},
                            [&](const Thread& t) { t.copy_16(t.shared<float>() + 1, from, true); }),
               simt::Violation);
  EXPECT_THROW(simt::launch({.shared_bytes = 64},
                            [](const Thread& t) {
                              uint32_t out[4];
                              t.load_matrices(t.shared<Bf16>() + t.lane() * 8, out);
                            }),
               simt::Violation);
}

TEST(Simt, RefusesAThreadThatDoesNotWaitForTheKernelBefore) {
  const auto run = [](int32_t waiting) {
    simt::launch({.overlaps = true}, [&](const Thread& t) {
      if (t.lane() < waiting)
        t.wait_for_predecessor();
    });
  };
  run(32);
  EXPECT_THROW(run(31), simt::Violation);
}

TEST(Simt, PassesOnWhatTheBodyThrows) {
  EXPECT_THROW(simt::launch({}, [](const Thread&) { throw std::range_error("mine"); }),
               std::range_error);
}

}  // namespace
}  // namespace flowprefill
