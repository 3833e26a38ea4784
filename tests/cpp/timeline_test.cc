// Timeline: the ring's edges, and snapshots while it is being written.
#include "runtime/timeline.h"

#include <gtest/gtest.h>

#include <thread>

#include "scripted_program.h"

namespace flowprefill {
namespace {

// Every field follows from the index, so that a torn record shows.
TimelineRecord record_of(uint64_t index) {
  static constexpr const char* kOps[] = {"norm", "attention", "gate_up"};
  const auto n = static_cast<int32_t>(index);
  return {.index = index,
          .run_id = 1000 + index,
          .segment = static_cast<uint32_t>(index * 7),
          .label = {.op = kOps[index % 3],
                    .layer = -n,
                    .last_layer = n + 1,
                    .row_begin = 2 * n,
                    .row_end = 2 * n + 64,
                    .predicted_s = 0.25 * static_cast<double>(index)},
          .start_ns = 10 * n,
          .end_ns = 10 * n + 9};
}

void expect_whole(const TimelineRecord& record) {
  const TimelineRecord expected = record_of(record.index);
  ASSERT_EQ(record.run_id, expected.run_id);
  ASSERT_EQ(record.segment, expected.segment);
  ASSERT_EQ(record.label.op, expected.label.op);
  ASSERT_EQ(record.label.layer, expected.label.layer);
  ASSERT_EQ(record.label.last_layer, expected.label.last_layer);
  ASSERT_EQ(record.label.row_begin, expected.label.row_begin);
  ASSERT_EQ(record.label.row_end, expected.label.row_end);
  ASSERT_EQ(record.label.predicted_s, expected.label.predicted_s);
  ASSERT_EQ(record.start_ns, expected.start_ns);
  ASSERT_EQ(record.end_ns, expected.end_ns);
}

void append(Timeline& timeline, uint64_t count) {
  for (uint64_t i = 0; i < count; ++i) {
    timeline.append(record_of(timeline.size()));
  }
}

TEST(TimelineTest, capacity_must_be_a_power_of_two) {
  EXPECT_THROW(Timeline(0), std::invalid_argument);
  EXPECT_THROW(Timeline(100), std::invalid_argument);
  EXPECT_EQ(Timeline(1).capacity(), 1u);
  EXPECT_EQ(Timeline().capacity(), 65536u);
}

TEST(TimelineTest, empty_snapshot_is_empty) {
  const TimelineSnapshot snapshot = Timeline(8).snapshot();
  EXPECT_TRUE(snapshot.records.empty());
  EXPECT_EQ(snapshot.next, 0u);
  EXPECT_EQ(snapshot.num_lost, 0u);
}

TEST(TimelineTest, records_come_back_whole_and_in_order) {
  Timeline timeline(8);
  append(timeline, 5);
  const TimelineSnapshot snapshot = timeline.snapshot();
  ASSERT_EQ(snapshot.records.size(), 5u);
  for (uint64_t i = 0; i < 5; ++i) {
    EXPECT_EQ(snapshot.records[i].index, i);
    expect_whole(snapshot.records[i]);
  }
}

TEST(TimelineTest, snapshot_since_goes_on_where_the_last_one_ended) {
  Timeline timeline(8);
  append(timeline, 3);
  const uint64_t next = timeline.snapshot().next;
  EXPECT_EQ(next, 3u);
  append(timeline, 2);
  const TimelineSnapshot snapshot = timeline.snapshot(next);
  ASSERT_EQ(snapshot.records.size(), 2u);
  EXPECT_EQ(snapshot.records[0].index, 3u);
  EXPECT_TRUE(timeline.snapshot(snapshot.next).records.empty());
  EXPECT_EQ(timeline.snapshot(99).next, 99u);
}

TEST(TimelineTest, overwritten_records_are_counted_as_lost) {
  Timeline timeline(8);
  append(timeline, 20);
  const TimelineSnapshot snapshot = timeline.snapshot(2);
  ASSERT_EQ(snapshot.records.size(), 8u);
  EXPECT_EQ(snapshot.records[0].index, 12u);
  EXPECT_EQ(snapshot.num_lost, 10u);
  EXPECT_EQ(snapshot.next, 20u);
}

TEST(TimelineTest, records_of_one_run_since_its_start_newest_first) {
  Timeline timeline(8);
  for (uint64_t i = 0; i < 20; ++i) {
    TimelineRecord record = record_of(i);
    record.run_id = i % 2;
    timeline.append(record);
  }
  const auto indices_since = [&](int64_t start_ns) {
    std::vector<uint64_t> indices;
    for (const TimelineRecord& record : timeline.of_run(1, start_ns))
      indices.push_back(record.index);
    return indices;
  };
  EXPECT_EQ(indices_since(0), (std::vector<uint64_t>{19, 17, 15, 13}));
  EXPECT_EQ(indices_since(10 * 16), (std::vector<uint64_t>{19, 17}));
  EXPECT_TRUE(timeline.of_run(2, 0).empty());
}

// The smaller the ring, the more often the writer is in the slot that is being read.
class TimelineRace : public ::testing::TestWithParam<size_t> {};

TEST_P(TimelineRace, snapshots_while_writing_are_never_torn) {
  // Enough that writer and reader run at the same time for a while on a busy machine too.
  constexpr int kSnapshots = 2'000'000 / FP_STRESS_DIVISOR;
  Timeline timeline(GetParam());
  std::jthread writer([&](const std::stop_token& stop) {
    while (!stop.stop_requested()) {
      append(timeline, 64);
    }
  });
  while (timeline.size() == 0) {
    std::this_thread::yield();
  }
  uint64_t since = 0;
  uint64_t num_seen = 0;
  uint64_t num_lost = 0;
  const auto look = [&] {
    const TimelineSnapshot snapshot = timeline.snapshot(since);
    uint64_t previous = since;
    for (const TimelineRecord& record : snapshot.records) {
      ASSERT_GE(record.index, previous);
      previous = record.index + 1;
      expect_whole(record);
    }
    num_seen += snapshot.records.size();
    num_lost += snapshot.num_lost;
    since = snapshot.next;
  };
  for (int i = 0; i < kSnapshots && !HasFailure(); ++i) {
    look();
  }
  writer.request_stop();
  writer.join();
  append(timeline, 1);
  look();
  EXPECT_EQ(num_seen + num_lost, timeline.size());
  EXPECT_GE(num_seen, 1u);
}

INSTANTIATE_TEST_SUITE_P(Capacities, TimelineRace, ::testing::Values(1, 2, 64));

}  // namespace
}  // namespace flowprefill
