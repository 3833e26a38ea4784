// Executor: the thread that owns the device and executes runs segment by segment; called by the
// engine through csrc/bindings.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "runtime/device.h"
#include "runtime/event_queue.h"
#include "runtime/mailbox.h"
#include "runtime/run.h"
#include "runtime/timeline.h"

namespace flowprefill {

// dispatch() after stop().
class ExecutorStopped : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct ExecutorOptions {
  size_t timeline_capacity = Timeline::kDefaultCapacity;  // records, a power of two
};

// Counts since start; each is exact, together they may be of different moments.
struct ExecutorStats {
  uint64_t num_segments = 0;
  uint64_t num_dispatched = 0;
  uint64_t num_started = 0;    // first starts and resumptions
  uint64_t num_suspended = 0;  // preempted or suspended on request
  uint64_t num_finished = 0;
  uint64_t num_cancelled = 0;
  uint64_t num_failed = 0;
  int64_t max_blocking_ns = 0;
};

// Between two segments the executor looks at two words, the mailbox and the current run's own;
// nothing else happens there: no lock, no system call, one clock reading per segment. It sleeps
// when it has no run. There is no mutex; every shared member is atomic or constant after start().
//
// Every run that ends posts exactly one terminal event, by the thread that made the transition. No
// event of a run follows its terminal one.
class Executor {
 public:
  // Throws std::invalid_argument without a device or for a bad option.
  explicit Executor(std::unique_ptr<Device> device, ExecutorOptions options = {});
  // As stop(); not on the executor's own thread. In a forked child, where that is not, it waits for
  // nothing.
  ~Executor();  // NOLINT(bugprone-exception-escape)
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  // Starts the thread and waits until the device is attached; throws what attach() threw (the
  // executor is then stopped), std::logic_error if started before.
  void start();

  // Closes the mailbox, cancels the run in it and (at its next boundary) the current one, joins.
  // Runs elsewhere are left as they are. Idempotent, from any thread but the executor's own
  // (std::logic_error). Blocks for at most one segment; release the GIL around it.
  void stop();

  // Makes `run` the next to execute; the current one will be suspended at its next boundary.
  // Returns the run this one displaced from the mailbox (neither started nor changed), or null.
  // Dispatching the current run lets it go on, taking back an earlier suspend request; dispatching
  // null empties the mailbox. Before start() the run waits in the mailbox.
  // Throws std::invalid_argument if the run has ended, ExecutorStopped after stop() (run
  // unchanged). Thread: any; lock-free; a system call only if the executor sleeps.
  RunRef dispatch(RunRef run);

  // Ends the run as cancelled. A run that is ready or suspended ends within this call, on this
  // thread, even if it lies in the mailbox. A running one ends at its next boundary, and after its
  // last segment too: true means that it will not end as finished. (It ends as failed if the
  // segment being executed throws.) False: it has ended already. Thread: any; lock-free.
  bool cancel(Run& run);

  // Suspends the run at its next boundary if it is current; the executor goes on with the mailbox
  // or sleeps. False, and no effect, if it is not running. A run in its last segment still
  // finishes. Thread: any; lock-free.
  bool suspend(Run& run) { return run.request_suspend(); }

  EventQueue& events() { return events_; }
  const Timeline& timeline() const { return timeline_; }
  const Device& device() const { return *device_; }
  ExecutorStats stats() const;

 private:
  void shut_down();
  void thread_main();
  void execute_until_idle();
  bool at_boundary();
  void take_mail();
  void execute_segment();
  void record_segment(const TimelineRecord& record);
  void record_completed();
  bool begin(Run& run);
  void leave(RunState to);
  void fail(size_t segment, const std::exception_ptr& error);
  int64_t settle();
  void end(RunState to, int64_t time_ns);

  const std::unique_ptr<Device> device_;
  EventQueue events_;
  Timeline timeline_;
  Mailbox mailbox_;
  const pid_t process_ = getpid();
  std::thread thread_;
  std::atomic<bool> is_started_{false};
  std::once_flag stop_once_;
  std::atomic<bool> is_attached_{false};  // or failed to: attach_error_ is set then
  std::exception_ptr attach_error_;       // written before is_attached_

  // Only the executor's thread touches these.
  RunRef current_;
  int64_t segment_start_ns_ = 0;           // end of the segment before
  bool is_fresh_ = true;                   // nothing was launched since the last drain
  std::vector<TimelineRecord> in_flight_;  // launched; the device has not told their times yet

  std::atomic<uint64_t> num_dispatched_{0};
  std::atomic<uint64_t> num_started_{0};
  std::atomic<uint64_t> num_suspended_{0};
  std::atomic<uint64_t> num_finished_{0};
  std::atomic<uint64_t> num_cancelled_{0};
  std::atomic<uint64_t> num_failed_{0};
  std::atomic<int64_t> max_blocking_ns_{0};
};

}  // namespace flowprefill
