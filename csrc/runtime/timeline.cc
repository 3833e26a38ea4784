// Timeline: a ring of slots, each guarded by a sequence number (a seqlock without fences).
#include "runtime/timeline.h"

#include <algorithm>
#include <bit>
#include <stdexcept>
#include <string>

namespace flowprefill {

namespace {

uint64_t pack(uint32_t high, uint32_t low) {
  return uint64_t{high} << 32 | low;
}
uint64_t pack(int32_t high, int32_t low) {
  return pack(static_cast<uint32_t>(high), static_cast<uint32_t>(low));
}
int32_t high_half(uint64_t word) {
  return static_cast<int32_t>(word >> 32);
}
int32_t low_half(uint64_t word) {
  return static_cast<int32_t>(word & 0xffffffffu);
}

size_t checked_capacity(size_t capacity) {
  if (!std::has_single_bit(capacity)) {
    throw std::invalid_argument("timeline capacity: got " + std::to_string(capacity) +
                                ", expected a power of two");
  }
  return capacity;
}

}  // namespace

Timeline::Timeline(size_t capacity)
    : mask_(checked_capacity(capacity) - 1), slots_(std::make_unique<Slot[]>(capacity)) {}

void Timeline::append(const TimelineRecord& record) noexcept {
  const uint64_t index = next_.load(std::memory_order_relaxed);
  Slot& slot = slots_[index & mask_];
  const uint64_t words[kWords] = {
      record.run_id,
      reinterpret_cast<uintptr_t>(record.label.op),
      pack(record.label.layer, record.label.last_layer),
      pack(record.label.row_begin, record.label.row_end),
      static_cast<uint64_t>(record.start_ns),
      static_cast<uint64_t>(record.end_ns),
      std::bit_cast<uint64_t>(record.label.predicted_s),
      record.segment,
  };
  slot.sequence.store(2 * index + 1, std::memory_order_relaxed);
  // Each word is released: a reader that sees a new word also sees the odd sequence above when it
  // looks again. (Cheaper fences exist, but ThreadSanitizer does not follow them.)
  for (size_t i = 0; i < kWords; ++i)
    slot.words[i].store(words[i], std::memory_order_release);
  slot.sequence.store(2 * index + 2, std::memory_order_release);
  next_.store(index + 1, std::memory_order_release);
}

bool Timeline::read(uint64_t index, TimelineRecord& record) const {
  const Slot& slot = slots_[index & mask_];
  const uint64_t expected = 2 * index + 2;
  if (slot.sequence.load(std::memory_order_acquire) != expected)
    return false;
  uint64_t words[kWords];
  for (size_t i = 0; i < kWords; ++i)
    words[i] = slot.words[i].load(std::memory_order_acquire);
  if (slot.sequence.load(std::memory_order_relaxed) != expected)
    return false;
  record.index = index;
  record.run_id = words[0];
  record.label.op = reinterpret_cast<const char*>(static_cast<uintptr_t>(words[1]));
  record.label.layer = high_half(words[2]);
  record.label.last_layer = low_half(words[2]);
  record.label.row_begin = high_half(words[3]);
  record.label.row_end = low_half(words[3]);
  record.start_ns = static_cast<int64_t>(words[4]);
  record.end_ns = static_cast<int64_t>(words[5]);
  record.label.predicted_s = std::bit_cast<double>(words[6]);
  record.segment = static_cast<uint32_t>(words[7]);
  return true;
}

TimelineSnapshot Timeline::snapshot(uint64_t since) const {
  TimelineSnapshot snapshot;
  const uint64_t next = size();
  snapshot.next = std::max(since, next);
  const uint64_t oldest = next > capacity() ? next - capacity() : 0;
  const uint64_t begin = std::max(since, oldest);
  if (begin < next)
    snapshot.records.reserve(next - begin);
  for (uint64_t index = begin; index < next; ++index) {
    TimelineRecord record;
    if (read(index, record))
      snapshot.records.push_back(record);
  }
  if (since < next)
    snapshot.num_lost = next - since - snapshot.records.size();
  return snapshot;
}

std::vector<TimelineRecord> Timeline::of_run(uint64_t run_id, int64_t start_ns) const {
  std::vector<TimelineRecord> records;
  const uint64_t next = size();
  const uint64_t oldest = next > capacity() ? next - capacity() : 0;
  for (uint64_t index = next; index > oldest; --index) {
    TimelineRecord record;
    if (!read(index - 1, record) || record.start_ns < start_ns)
      break;
    if (record.run_id == run_id)
      records.push_back(record);
  }
  return records;
}

}  // namespace flowprefill
