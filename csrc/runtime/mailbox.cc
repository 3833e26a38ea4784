// Mailbox: see mailbox.h. A reference travels as a raw pointer while it lies in the word.
#include "runtime/mailbox.h"

namespace flowprefill {

Mailbox::~Mailbox() {
  close();
}

Mailbox::Delivery Mailbox::put(RunRef& run) noexcept {
  // An exchange that leaves the closed mark alone: whether a run got in before close() is decided
  // by this one word.
  Run* found = word_.load(std::memory_order_acquire);
  do {
    if (found == closed())
      return Delivery::kClosed;
  } while (!word_.compare_exchange_weak(found, run.get(), std::memory_order_acq_rel,
                                        std::memory_order_acquire));
  const bool is_mail = run.detach() != nullptr;
  run = RunRef::adopt(found);
  if (is_mail) {
    arrivals_.fetch_add(1, std::memory_order_release);
    arrivals_.notify_one();
  }
  return Delivery::kPut;
}

RunRef Mailbox::take() noexcept {
  Run* found = word_.load(std::memory_order_acquire);
  do {
    if (found == nullptr || found == closed())
      return nullptr;
  } while (!word_.compare_exchange_weak(found, nullptr, std::memory_order_acq_rel,
                                        std::memory_order_acquire));
  return RunRef::adopt(found);
}

bool Mailbox::remove(const Run& run) noexcept {
  Run* found = const_cast<Run*>(&run);
  if (!word_.compare_exchange_strong(found, nullptr, std::memory_order_acq_rel,
                                     std::memory_order_acquire)) {
    return false;
  }
  RunRef::adopt(found);  // dropped here
  return true;
}

RunRef Mailbox::close() noexcept {
  Run* found = word_.exchange(closed(), std::memory_order_acq_rel);
  arrivals_.fetch_add(1, std::memory_order_release);
  arrivals_.notify_all();
  return found == closed() ? RunRef() : RunRef::adopt(found);
}

void Mailbox::wait() const noexcept {
  // The count is read first: what comes after that changes it, and the wait ends at once.
  for (uint32_t seen = arrivals_.load(std::memory_order_acquire); !has_mail();
       seen = arrivals_.load(std::memory_order_acquire)) {
    arrivals_.wait(seen, std::memory_order_acquire);
  }
}

}  // namespace flowprefill
