// Run: state word, accounting, reference count. See run.h for who may call what.
#include "runtime/run.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace flowprefill {

namespace {

constexpr auto kRelaxed = std::memory_order_relaxed;

constexpr unsigned bit(RunState state) {
  return 1u << static_cast<unsigned>(state);
}

// Row: from; set bits: where to.
constexpr unsigned kLegal[] = {
    /* kReady     */ bit(RunState::kRunning) | bit(RunState::kCancelled),
    /* kRunning   */ bit(RunState::kSuspended) | bit(RunState::kFinished) |
        bit(RunState::kCancelled) | bit(RunState::kFailed),
    /* kSuspended */ bit(RunState::kRunning) | bit(RunState::kCancelled),
    /* kFinished  */ 0,
    /* kCancelled */ 0,
    /* kFailed    */ 0,
};

std::vector<double> suffix_sums(const Program& program) {
  const size_t size = program.size();
  std::vector<double> sums(size + 1, 0.0);
  for (size_t i = size; i-- > 0;)
    sums[i] = sums[i + 1] + program.label(i).predicted_s;
  return sums;
}

std::unique_ptr<Program> checked(uint64_t id, std::unique_ptr<Program> program) {
  if (program == nullptr) {
    throw std::invalid_argument("run " + std::to_string(id) + ": program: got none");
  }
  if (program->size() > std::numeric_limits<uint32_t>::max()) {
    throw std::invalid_argument("run " + std::to_string(id) + ": program: got " +
                                std::to_string(program->size()) +
                                " segments, expected fewer than 2^32");
  }
  return program;
}

}  // namespace

const char* to_string(RunState state) {
  switch (state) {
    case RunState::kReady:
      return "ready";
    case RunState::kRunning:
      return "running";
    case RunState::kSuspended:
      return "suspended";
    case RunState::kFinished:
      return "finished";
    case RunState::kCancelled:
      return "cancelled";
    case RunState::kFailed:
      return "failed";
  }
  return "invalid";
}

bool is_legal(RunState from, RunState to) {
  return (kLegal[static_cast<unsigned>(from)] & bit(to)) != 0;
}

Run::Run(uint64_t id, std::unique_ptr<Program> program)
    : id_(id), program_(checked(id, std::move(program))), remaining_s_(suffix_sums(*program_)) {}

std::string Run::error() const {
  return state() == RunState::kFailed ? error_ : std::string();
}

RunAccounting Run::accounting() const {
  RunAccounting accounting;
  accounting.dispatched_ns = dispatched_ns_.load(kRelaxed);
  accounting.first_start_ns = first_start_ns_.load(kRelaxed);
  accounting.last_end_ns = last_end_ns_.load(kRelaxed);
  accounting.running_ns = running_ns_.load(kRelaxed);
  accounting.suspended_ns = suspended_ns_.load(kRelaxed);
  accounting.last_blocking_ns = last_blocking_ns_.load(kRelaxed);
  accounting.max_blocking_ns = max_blocking_ns_.load(kRelaxed);
  accounting.num_preemptions = num_preemptions_.load(kRelaxed);
  return accounting;
}

bool Run::transition(RunState from, RunState to) {
  if (!is_legal(from, to)) {
    throw std::logic_error("run " + std::to_string(id_) + ": no way from " + to_string(from) +
                           " to " + to_string(to));
  }
  const bool ends_a_cancelled_run = to == RunState::kCancelled || to == RunState::kFailed;
  uint32_t word = word_.load(std::memory_order_acquire);
  do {
    if (state_of(word) != from)
      return false;
    if ((word & kCancelBit) != 0 && !ends_a_cancelled_run)
      return false;
  } while (!word_.compare_exchange_weak(word, static_cast<uint32_t>(to), std::memory_order_acq_rel,
                                        std::memory_order_acquire));
  return true;
}

bool Run::request(uint32_t bit) {
  uint32_t word = word_.load(std::memory_order_acquire);
  do {
    if (state_of(word) != RunState::kRunning)
      return false;
  } while (!word_.compare_exchange_weak(word, word | bit, std::memory_order_acq_rel,
                                        std::memory_order_acquire));
  return true;
}

void Run::note_dispatched(int64_t time_ns) {
  dispatched_ns_.store(time_ns, kRelaxed);
}

// The first segment since a dispatch starts: ends the suspension, if any, and the blocking time.
void Run::note_started(int64_t time_ns) {
  if (first_start_ns_.load(kRelaxed) == 0)
    first_start_ns_.store(time_ns, kRelaxed);
  close_suspension(time_ns);
  // A dispatch that comes between the start and this line would make it negative.
  const int64_t blocking_ns = std::max<int64_t>(0, time_ns - dispatched_ns_.load(kRelaxed));
  last_blocking_ns_.store(blocking_ns, kRelaxed);
  if (blocking_ns > max_blocking_ns_.load(kRelaxed))
    max_blocking_ns_.store(blocking_ns, kRelaxed);
}

void Run::note_running(int64_t start_ns, int64_t end_ns) {
  running_ns_.store(running_ns_.load(kRelaxed) + end_ns - start_ns, kRelaxed);
  last_end_ns_.store(end_ns, kRelaxed);
}

void Run::note_segment(int64_t start_ns, int64_t end_ns) {
  note_running(start_ns, end_ns);
  cursor_.store(cursor_.load(kRelaxed) + 1, kRelaxed);
}

void Run::note_suspended(int64_t time_ns) {
  num_preemptions_.store(num_preemptions_.load(kRelaxed) + 1, kRelaxed);
  // Suspended again before it executed anything: one long suspension.
  if (suspended_since_ns_.load(kRelaxed) == 0)
    suspended_since_ns_.store(time_ns, kRelaxed);
}

// Closes a suspension that is open when the run goes on or ends.
void Run::close_suspension(int64_t time_ns) {
  const int64_t since_ns = suspended_since_ns_.load(kRelaxed);
  if (since_ns == 0)
    return;
  suspended_ns_.store(suspended_ns_.load(kRelaxed) + time_ns - since_ns, kRelaxed);
  suspended_since_ns_.store(0, kRelaxed);
}

void retain(Run* run) noexcept {
  run->references_.fetch_add(1, kRelaxed);
}

void release(Run* run) noexcept {
  // acq_rel: whatever any holder did to the run happens before its destruction.
  if (run->references_.fetch_sub(1, std::memory_order_acq_rel) == 1)
    delete run;
}

}  // namespace flowprefill
