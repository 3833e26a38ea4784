// Executor: the loop between dispatch and events. Read thread_main() first, then downwards.
#include "runtime/executor.h"

#include <pthread.h>

#include <algorithm>
#include <string>
#include <utility>

#include "runtime/clock.h"
#include "runtime/own_thread.h"

namespace flowprefill {

namespace {

constexpr auto kRelaxed = std::memory_order_relaxed;
constexpr size_t kMaxInFlight = 16;  // of any device: room for these is taken at the start

std::unique_ptr<Device> checked(std::unique_ptr<Device> device) {
  if (device == nullptr)
    throw std::invalid_argument("executor: device: got none");
  return device;
}

EventKind event_of(RunState state) {
  switch (state) {
    case RunState::kFinished:
      return EventKind::kFinished;
    case RunState::kFailed:
      return EventKind::kFailed;
    default:
      return EventKind::kCancelled;
  }
}

std::string message_of(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const std::exception& exception) {
    return exception.what();
  } catch (...) {
    return "an exception that is not a std::exception";
  }
}

std::string describe(const Run& run, size_t segment, const std::exception_ptr& error) {
  std::string text = "run " + std::to_string(run.id()) + ": ";
  if (segment < run.num_segments()) {
    try {
      const SegmentLabel label = run.program().label(segment);
      text += "operator '" + std::string(label.op) + "' of layer " + std::to_string(label.layer) +
              ", rows " + std::to_string(label.row_begin) + ".." + std::to_string(label.row_end) +
              " ";
    } catch (...) {
      text += "a segment whose label cannot be read ";
    }
    text +=
        "(segment " + std::to_string(segment) + " of " + std::to_string(run.num_segments()) + ") ";
  }
  return text + "failed: " + message_of(error);
}

}  // namespace

Executor::Executor(std::unique_ptr<Device> device, ExecutorOptions options)
    : device_(checked(std::move(device))), timeline_(options.timeline_capacity) {
  in_flight_.reserve(kMaxInFlight);
}

// join() can throw only on the executor's own thread: our bug, and the end.
Executor::~Executor() {  // NOLINT(bugprone-exception-escape)
  shut_down();
}

void Executor::start() {
  if (mailbox_.is_closed() || is_started_.exchange(true)) {
    throw std::logic_error("executor: start() after start() or stop()");
  }
  thread_ = std::thread([this] { thread_main(); });
  is_attached_.wait(false, std::memory_order_acquire);
  if (attach_error_ == nullptr)
    return;
  stop();
  std::rethrow_exception(attach_error_);
}

void Executor::stop() {
  if (thread_.get_id() == std::this_thread::get_id()) {
    throw std::logic_error("executor: stop() on its own thread");
  }
  shut_down();
}

void Executor::shut_down() {
  std::call_once(stop_once_, [this] {
    if (const RunRef waiting = mailbox_.close())
      cancel(*waiting);
    if (thread_.joinable())
      join_own(thread_, process_);
  });
}

RunRef Executor::dispatch(RunRef run) {
  if (run) {
    if (const RunState state = run->state(); is_terminal(state)) {
      throw std::invalid_argument("run " + std::to_string(run->id()) + ": dispatched after it " +
                                  (state == RunState::kCancelled ? "was " : "has ") +
                                  to_string(state));
    }
    // Before the mailbox, so that a suspend() after this call counts and one before it does not.
    run->clear_suspend_request();
    run->note_dispatched(now_ns());
  }
  const bool is_run = run != nullptr;
  if (mailbox_.put(run) == Mailbox::Delivery::kClosed) {
    throw ExecutorStopped("executor: dispatch() after stop()");
  }
  if (is_run)
    num_dispatched_.fetch_add(1, kRelaxed);
  return run;
}

bool Executor::cancel(Run& run) {
  for (;;) {
    const RunState state = run.state();
    if (is_terminal(state))
      return false;
    if (state == RunState::kRunning) {
      if (run.request_cancel())
        return true;
    } else if (run.transition(state, RunState::kCancelled)) {
      const int64_t time_ns = now_ns();
      run.close_suspension(time_ns);
      num_cancelled_.fetch_add(1, kRelaxed);
      events_.push(RunRef(&run), EventKind::kCancelled, time_ns);
      mailbox_.remove(run);
      return true;
    }
  }
}

ExecutorStats Executor::stats() const {
  ExecutorStats stats;
  stats.num_segments = timeline_.size();
  stats.num_dispatched = num_dispatched_.load(kRelaxed);
  stats.num_started = num_started_.load(kRelaxed);
  stats.num_suspended = num_suspended_.load(kRelaxed);
  stats.num_finished = num_finished_.load(kRelaxed);
  stats.num_cancelled = num_cancelled_.load(kRelaxed);
  stats.num_failed = num_failed_.load(kRelaxed);
  stats.max_blocking_ns = max_blocking_ns_.load(kRelaxed);
  return stats;
}

void Executor::thread_main() {
  pthread_setname_np(pthread_self(), "fp-executor");
  try {
    device_->attach();
  } catch (...) {
    attach_error_ = std::current_exception();
  }
  const bool is_usable = attach_error_ == nullptr;
  is_attached_.store(true, std::memory_order_release);
  is_attached_.notify_all();
  if (!is_usable)
    return;
  for (;;) {
    mailbox_.wait();
    if (mailbox_.is_closed())
      break;
    current_ = mailbox_.take();  // null if it was emptied in the meantime
    if (current_ && !begin(*current_))
      current_.reset();
    execute_until_idle();
  }
  device_->detach();
}

void Executor::execute_until_idle() {
  while (current_) {
    if (current_->cursor() == current_->num_segments()) {
      leave(RunState::kFinished);  // before looking at the mailbox: nothing is left to preempt
    } else if (at_boundary()) {
      execute_segment();
    }
  }
}

// Mail first, then the current run's own requests. Returns whether there is a segment to execute.
bool Executor::at_boundary() {
  if (mailbox_.has_mail()) [[unlikely]] {
    take_mail();
  }
  if (current_ && current_->has_request()) [[unlikely]] {
    leave(current_->is_cancel_requested() ? RunState::kCancelled : RunState::kSuspended);
  }
  return current_ && current_->cursor() < current_->num_segments();
}

void Executor::take_mail() {
  if (mailbox_.is_closed()) {
    current_->request_cancel();
    return;
  }
  RunRef next = mailbox_.take();
  // The newcomer is started before the current run is touched: if it cannot be (it was cancelled on
  // its way, or is the current run itself), the current one goes on undisturbed.
  if (!next || !begin(*next))
    return;
  leave(current_->is_cancel_requested() ? RunState::kCancelled : RunState::kSuspended);
  current_ = std::move(next);
}

bool Executor::begin(Run& run) {
  if (!run.transition(RunState::kReady, RunState::kRunning) &&
      !run.transition(RunState::kSuspended, RunState::kRunning)) {
    return false;  // it has ended, or is running already
  }
  num_started_.fetch_add(1, kRelaxed);
  return true;
}

void Executor::execute_segment() {
  Run& run = *current_;
  TimelineRecord record;
  record.run_id = run.id();
  record.segment = static_cast<uint32_t>(run.cursor());
  if (is_fresh_) {
    segment_start_ns_ = now_ns();
    run.note_started(segment_start_ns_);
    const int64_t blocking_ns = run.last_blocking_ns_.load(kRelaxed);
    if (blocking_ns > max_blocking_ns_.load(kRelaxed)) {
      max_blocking_ns_.store(blocking_ns, kRelaxed);
    }
    is_fresh_ = false;
  }
  record.start_ns = segment_start_ns_;
  try {
    record.label = run.program().label(record.segment);
    device_->launch(run.program(), record.segment);
    device_->throttle();
  } catch (...) {
    fail(record.segment, std::current_exception());
    return;
  }
  record.end_ns = now_ns();
  record_segment(record);
  run.note_segment(record.start_ns, record.end_ns);
  segment_start_ns_ = record.end_ns;
}

// The timeline shows when segments ran, by the device's own account if it has one. A run's
// accounting goes by the host's clock on every device: see settle().
void Executor::record_segment(const TimelineRecord& record) {
  if (!device_->has_segment_times()) {
    timeline_.append(record);
    return;
  }
  in_flight_.push_back(record);
  record_completed();
}

void Executor::record_completed() {
  SegmentTime time;
  size_t num_completed = 0;
  while (num_completed < in_flight_.size() && device_->take_segment_time(time)) {
    TimelineRecord& record = in_flight_[num_completed++];
    record.start_ns = time.start_ns;
    record.end_ns = time.end_ns;
    timeline_.append(record);
  }
  in_flight_.erase(in_flight_.begin(), in_flight_.begin() + static_cast<ptrdiff_t>(num_completed));
}

// After a drain: accounts to the current run what the device did after its last throttle, and
// returns the time. So a run is charged, without gaps, from the start of its first segment since a
// dispatch until nothing of it is in flight, launching and waiting included: what it cost all
// others. Times told by the device would leave out launches that are slower than the work, and
// whatever a failing device never tells.
int64_t Executor::settle() {
  record_completed();
  const int64_t time_ns = now_ns();
  if (!is_fresh_)
    current_->note_running(segment_start_ns_, time_ns);
  is_fresh_ = true;
  return time_ns;
}

// Takes the current run off the device, in state `to`: kSuspended, kFinished or kCancelled. A
// cancel accepted before this decides wins over the first two; an error while draining over all.
void Executor::leave(RunState to) {
  Run& run = *current_;
  try {
    device_->drain();
    if (to == RunState::kSuspended)
      run.program().give_back_dead(run.cursor());
  } catch (...) {
    fail(run.cursor() == 0 ? 0 : run.cursor() - 1, std::current_exception());
    return;
  }
  const int64_t time_ns = settle();
  if (to != RunState::kSuspended) {
    end(to, time_ns);
    return;
  }
  // Everything before the transition: after it the run may belong to a cancelling thread, whose
  // event has to come after this one.
  run.note_suspended(time_ns);
  num_suspended_.fetch_add(1, kRelaxed);
  events_.push(current_, EventKind::kSuspended, time_ns);
  if (run.transition(RunState::kRunning, RunState::kSuspended)) {
    current_.reset();
  } else {
    end(RunState::kCancelled, time_ns);
  }
}

void Executor::fail(size_t segment, const std::exception_ptr& error) {
  std::exception_ptr drain_error;
  try {
    device_->drain();
  } catch (...) {
    drain_error = std::current_exception();
  }
  const int64_t time_ns = settle();
  in_flight_.clear();  // what is left did not complete
  try {
    std::string message = describe(*current_, segment, error);
    if (drain_error)
      message += "; and while draining: " + message_of(drain_error);
    current_->set_error(std::move(message));
  } catch (...) {
    // No memory for the message: it stays empty, the failure itself is reported.
  }
  end(RunState::kFailed, time_ns);
}

// The one place where the executor ends a run: exactly one transition succeeds, and its event
// follows. The reference goes to the queue, so the executor never destroys a program.
void Executor::end(RunState to, int64_t time_ns) {
  current_->close_suspension(time_ns);
  if (!current_->transition(RunState::kRunning, to)) {
    to = RunState::kCancelled;  // a cancel came before; no other thread moves a running run
    current_->transition(RunState::kRunning, to);
  }
  std::atomic<uint64_t>& count = to == RunState::kFinished ? num_finished_
                                 : to == RunState::kFailed ? num_failed_
                                                           : num_cancelled_;
  count.fetch_add(1, kRelaxed);
  events_.push(std::move(current_), event_of(to), time_ns);
}

}  // namespace flowprefill
