// Run: one execution of a program, its cursor, state and accounting; made by the engine, moved by
// the executor, readable from any thread.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "runtime/event.h"
#include "runtime/ref.h"
#include "runtime/segment.h"

namespace flowprefill {

enum class RunState : uint8_t { kReady, kRunning, kSuspended, kFinished, kCancelled, kFailed };

const char* to_string(RunState state);

inline constexpr bool is_terminal(RunState state) {
  return state >= RunState::kFinished;
}

// Whether a run may ever go from one state to the other: the transition table.
bool is_legal(RunState from, RunState to);

// Where a run's time went, nanoseconds on the clock of clock.h; 0: has not happened.
// Exact once the run's terminal event was taken; before, figures may be of different moments.
struct RunAccounting {
  int64_t dispatched_ns = 0;     // last dispatch
  int64_t first_start_ns = 0;    // first segment started
  int64_t last_end_ns = 0;       // last segment so far ended; exact when nothing is in flight
  int64_t running_ns = 0;        // it had the device: from a start until nothing was in flight
  int64_t suspended_ns = 0;      // sum over suspensions that have ended
  int64_t last_blocking_ns = 0;  // from a dispatch to its first segment starting thereafter
  int64_t max_blocking_ns = 0;
  uint32_t num_preemptions = 0;  // how often it was suspended
};

// State and requests share one atomic word, so a request can neither be missed nor outlive the
// state it was meant for: a cancel is accepted for a running run exactly if its end is not decided
// yet, and a suspend request dies with the running state it was made in.
//
// Only the executor's thread moves a run out of kRunning.
class Run {
 public:
  // Throws std::invalid_argument without a program. Cost: calls label() of every segment.
  Run(uint64_t id, std::unique_ptr<Program> program);
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;

  uint64_t id() const { return id_; }
  Program& program() { return *program_; }
  const Program& program() const { return *program_; }
  size_t num_segments() const { return remaining_s_.size() - 1; }

  // The next segment to execute.
  size_t cursor() const { return cursor_.load(std::memory_order_relaxed); }
  RunState state() const { return state_of(word_.load(std::memory_order_acquire)); }
  // Why it failed: run, operator, layer, rows, the exception's message. Empty unless kFailed.
  std::string error() const;
  RunAccounting accounting() const;
  // Predicted time of the segments not done yet, seconds. O(1).
  double remaining_predicted_s() const { return remaining_s_[cursor()]; }

  // The one function that changes the state. False: the run is not in `from`, or a cancel was
  // accepted before (then only kCancelled and kFailed are open). Requests end with the state.
  // Throws std::logic_error if the table does not allow the move.
  bool transition(RunState from, RunState to);

  // Ask a running run to end or to stop at its next boundary. False: it is not running.
  bool request_cancel() { return request(kCancelBit); }
  bool request_suspend() { return request(kSuspendBit); }
  // Takes a suspend request back, if there is one.
  void clear_suspend_request() { word_.fetch_and(~kSuspendBit, std::memory_order_acq_rel); }

  bool has_request() const {
    return (word_.load(std::memory_order_acquire) & (kCancelBit | kSuspendBit)) != 0;
  }
  bool is_cancel_requested() const {
    return (word_.load(std::memory_order_acquire) & kCancelBit) != 0;
  }

 private:
  friend class Executor;
  friend class EventQueue;
  friend void retain(Run* run) noexcept;
  friend void release(Run* run) noexcept;

  static constexpr uint32_t kStateMask = 0xff;
  static constexpr uint32_t kCancelBit = 0x100;
  static constexpr uint32_t kSuspendBit = 0x200;
  static RunState state_of(uint32_t word) { return static_cast<RunState>(word & kStateMask); }

  ~Run() = default;  // by release()
  bool request(uint32_t bit);

  // Accounting; each called by the thread that owns the run at that moment, before the state change
  // that publishes it (close_suspension: after a caller's cancel, before its event).
  void note_dispatched(int64_t time_ns);
  void note_started(int64_t time_ns);
  void note_running(int64_t start_ns, int64_t end_ns);
  void note_segment(int64_t start_ns, int64_t end_ns);
  void note_suspended(int64_t time_ns);
  void close_suspension(int64_t time_ns);
  void set_error(std::string message) noexcept { error_ = std::move(message); }

  const uint64_t id_;
  const std::unique_ptr<Program> program_;
  std::vector<double> remaining_s_;  // suffix sums of predicted_s; size num_segments + 1
  std::string error_;                // written before kFailed, constant after

  std::atomic<uint32_t> references_{0};
  std::atomic<uint32_t> word_{static_cast<uint32_t>(RunState::kReady)};
  std::atomic<uint32_t> cursor_{0};

  std::atomic<int64_t> dispatched_ns_{0};
  std::atomic<int64_t> first_start_ns_{0};
  std::atomic<int64_t> last_end_ns_{0};
  std::atomic<int64_t> running_ns_{0};
  std::atomic<int64_t> suspended_ns_{0};
  std::atomic<int64_t> suspended_since_ns_{0};  // 0: not suspended
  std::atomic<int64_t> last_blocking_ns_{0};
  std::atomic<int64_t> max_blocking_ns_{0};
  std::atomic<uint32_t> num_preemptions_{0};

  EventNode terminal_event_;
  EventNode suspended_event_;
};

inline RunRef make_run(uint64_t id, std::unique_ptr<Program> program) {
  return RunRef(new Run(id, std::move(program)));
}

}  // namespace flowprefill
