// Team: every item once, exceptions, regions by the thousand, sleeping and waking, misuse.
#include "devices/cpu/team.h"

#include <gtest/gtest.h>

#include <chrono>
#include <fstream>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace flowprefill {
namespace {

using std::chrono::milliseconds;

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr int kRegions = 4000;
#else
constexpr int kRegions = 20000;
#endif
constexpr milliseconds kUntilAsleep{20};  // far longer than the team spins

// Waits for what must happen; false: it has not, after a time that only a bug takes.
template <typename Condition>
bool comes_true(const Condition& condition) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(100);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end)
      return false;
    std::this_thread::sleep_for(milliseconds(1));
  }
  return true;
}

class TeamSizes : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Threads, TeamSizes, ::testing::Values(1, 2, 4, 8));

TEST_P(TeamSizes, EveryItemIsDoneOnce) {
  Team team(GetParam());
  EXPECT_EQ(team.threads(), GetParam());
  for (const int64_t items : {0, 1, 2, 3, 7, 64, 1000, 100000}) {
    std::vector<int> counts(static_cast<size_t>(items));  // plain: a second claim would be a race
    team.for_each(items, [&](int64_t i) { ++counts[static_cast<size_t>(i)]; });
    EXPECT_EQ(counts, std::vector<int>(static_cast<size_t>(items), 1));
  }
}

TEST_P(TeamSizes, TinyRegionsSeeEachOthersResults) {
  Team team(GetParam());
  std::vector<int64_t> values(5);
  for (int region = 0; region < kRegions; ++region) {
    const int64_t before = values[static_cast<size_t>(region) % 5];
    team.for_each(5, [&](int64_t i) { values[static_cast<size_t>(i)] = before + 1; });
  }
  EXPECT_EQ(values, std::vector<int64_t>(5, kRegions));
}

TEST_P(TeamSizes, ExceptionIsRethrownAndTheTeamLivesOn) {
  Team team(GetParam());
  for (int round = 0; round < 200; ++round) {
    std::atomic<int64_t> num_done{0};
    const auto body = [&](int64_t i) {
      if (i == round % 50)
        throw std::runtime_error("item " + std::to_string(i));
      ++num_done;
    };
    try {
      team.for_each(50, body);
      ADD_FAILURE() << "no exception";
    } catch (const std::runtime_error& error) {
      EXPECT_EQ(error.what(), "item " + std::to_string(round % 50));
    }
    EXPECT_LT(num_done, 50);
    num_done = 0;
    team.for_each(50, [&](int64_t) { ++num_done; });
    EXPECT_EQ(num_done, 50);
  }
}

TEST_P(TeamSizes, OneOfManyExceptionsIsRethrown) {
  Team team(GetParam());
  for (int round = 0; round < 200; ++round)
    EXPECT_THROW(team.for_each(20, [](int64_t) { throw std::runtime_error("all"); }),
                 std::runtime_error);
  int64_t sum = 0;
  team.for_each(1, [&](int64_t) { ++sum; });
  EXPECT_EQ(sum, 1);
}

TEST_P(TeamSizes, SleepingTeamWakesAndEnds) {
  std::atomic<int64_t> sum{0};
  {
    Team team(GetParam());
    for (int round = 0; round < 5; ++round) {
      std::this_thread::sleep_for(kUntilAsleep);
      team.for_each(100, [&](int64_t i) { sum += i; });
    }
    std::this_thread::sleep_for(kUntilAsleep);
  }
  EXPECT_EQ(sum, 5 * 4950);
}

TEST_P(TeamSizes, ManyTeamsBeginAndEnd) {
  for (int round = 0; round < 100; ++round) {
    std::atomic<int64_t> sum{0};
    Team team(GetParam());
    if (round % 2 == 0)
      team.for_each(10, [&](int64_t i) { sum += i; });
    EXPECT_EQ(sum, round % 2 == 0 ? 45 : 0);
  }
}

TEST(Team, TwoTeamsWorkAtOnce) {
  const auto use = [](int64_t& sum) {
    Team team(2);
    std::vector<int64_t> values(16);
    for (int region = 0; region < kRegions / 10; ++region)
      team.for_each(16, [&](int64_t i) { values[static_cast<size_t>(i)] += i; });
    sum = std::accumulate(values.begin(), values.end(), int64_t{0});
  };
  int64_t first = 0;
  int64_t second = 0;
  std::thread other([&] { use(first); });
  use(second);
  other.join();
  EXPECT_EQ(first, int64_t{120} * (kRegions / 10));
  EXPECT_EQ(second, first);
}

// The caller has nothing to do, and waits for the other longer than it spins.
TEST(Team, CallerSleepsUntilTheLastItemIsDone) {
  Team team(2);
  for (int round = 0; round < 10; ++round) {
    std::atomic<int> num_done{0};
    const auto caller = std::this_thread::get_id();
    team.for_each(2, [&](int64_t) {
      if (std::this_thread::get_id() != caller)
        std::this_thread::sleep_for(kUntilAsleep);
      ++num_done;
    });
    EXPECT_EQ(num_done, 2);
  }
}

// A slow item holds back no other: the second thread does all the rest.
TEST(Team, SlowItemKeepsNoOtherBack) {
  Team team(2);
  std::atomic<int> num_done{0};
  team.for_each(50, [&](int64_t i) {
    if (i != 0) {
      ++num_done;
      return;
    }
    EXPECT_TRUE(comes_true([&] { return num_done == 49; })) << num_done;
  });
}

TEST(Team, UseFromAnItemIsRefused) {
  Team team(2);
  EXPECT_THROW(team.for_each(2, [&](int64_t) { team.for_each(2, [](int64_t) {}); }),
               std::logic_error);
  EXPECT_THROW(team.for_each(1, [&](int64_t) { team.for_each(1, [](int64_t) {}); }),
               std::logic_error);
  EXPECT_NO_THROW(team.for_each(2, [](int64_t) {}));
}

TEST(Team, UseByASecondThreadIsRefused) {
  Team team(2);
  team.for_each(1, [&](int64_t) {
    std::thread other([&] { EXPECT_THROW(team.for_each(2, [](int64_t) {}), std::logic_error); });
    other.join();
  });
}

TEST(Team, BadArgumentsAreRefused) {
  EXPECT_THROW(Team(0), std::invalid_argument);
  EXPECT_THROW(Team(-3), std::invalid_argument);
  Team team(2);
  EXPECT_THROW(team.for_each(int64_t{1} << 31, [](int64_t) {}), std::invalid_argument);
}

TEST(Team, CountsTheRegionsItsWorkersAreCalledTo) {
  Team alone(1);
  Team pair(2);
  for (Team* team : {&alone, &pair}) {
    for (const int64_t items : {0, 1, 2, 100})
      team->for_each(items, [](int64_t) {});
  }
  EXPECT_EQ(alone.num_regions(), 0u);
  EXPECT_EQ(pair.num_regions(), 2u);
}

std::string thread_state(pid_t thread) {
  std::ifstream file("/proc/self/task/" + std::to_string(thread) + "/status");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("State:"))
      return line;
  }
  return "no such thread";
}

TEST(Team, IdleWorkersSleep) {
  Team team(2);
  std::atomic<pid_t> worker{0};
  const auto caller = std::this_thread::get_id();
  team.for_each(2, [&](int64_t) {
    if (std::this_thread::get_id() != caller)
      worker = gettid();
    else
      EXPECT_TRUE(comes_true([&] { return worker != 0; })) << "the other item is the worker's";
  });
  EXPECT_TRUE(comes_true([&] {
    return thread_state(worker).find("S (sleeping)") != std::string::npos;
  })) << thread_state(worker);
}

}  // namespace
}  // namespace flowprefill
