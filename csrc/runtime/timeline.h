// Timeline: the last N segments executed, written by the executor, read from any thread.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "runtime/segment.h"

namespace flowprefill {

// One executed segment.
struct TimelineRecord {
  uint64_t index = 0;  // counts all records ever written
  uint64_t run_id = 0;
  uint32_t segment = 0;  // its position in the run's program
  SegmentLabel label;
  int64_t start_ns = 0;
  int64_t end_ns = 0;
};

struct TimelineSnapshot {
  std::vector<TimelineRecord> records;  // by index
  uint64_t next = 0;                    // pass as `since` to go on from here
  uint64_t num_lost = 0;                // records since `since` that were already overwritten
};

// A fixed ring. One writer, which never waits; readers never disturb it: each slot carries a
// sequence number, and a reader skips a slot that changed under its eyes.
class Timeline {
 public:
  static constexpr size_t kDefaultCapacity = 65536;

  // Throws std::invalid_argument unless `capacity` is a power of two.
  explicit Timeline(size_t capacity = kDefaultCapacity);

  // Writes one record (record.index is ignored). Thread: the single writer. Cost: 9 plain stores.
  void append(const TimelineRecord& record) noexcept;

  // All records with index >= since that are still in the ring. Any thread; never blocks.
  TimelineSnapshot snapshot(uint64_t since = 0) const;

  // The records of one run that are still in the ring, the newest first.
  // start_ns: when the run began, by the records' clock; none before that are looked at.
  // Thread: any; never blocks. Cost: some 20 ns for each record since then, of whichever run.
  std::vector<TimelineRecord> of_run(uint64_t run_id, int64_t start_ns) const;

  size_t capacity() const { return mask_ + 1; }
  // Records ever written.
  uint64_t size() const { return next_.load(std::memory_order_acquire); }

 private:
  static constexpr size_t kWords = 8;
  struct Slot {
    std::atomic<uint64_t> sequence{0};  // 2 * index + 1 while being written, 2 * index + 2 after
    std::array<std::atomic<uint64_t>, kWords> words{};
  };

  bool read(uint64_t index, TimelineRecord& record) const;

  const uint64_t mask_;
  const std::unique_ptr<Slot[]> slots_;
  alignas(64) std::atomic<uint64_t> next_{0};
};

}  // namespace flowprefill
