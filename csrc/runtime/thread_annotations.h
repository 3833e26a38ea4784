// Mutex, MutexLock and macros that say which mutex guards what: clang checks them (`make tidy`,
// `make tidy-cuda`), gcc ignores them. Used by every class of csrc/ that has a mutex, because the
// standard library's own carries no annotations.
#pragma once

#include <mutex>

#if defined(__clang__)
#define FP_THREAD_ATTRIBUTE(x) __attribute__((x))
#else
#define FP_THREAD_ATTRIBUTE(x)
#endif

// Of a member: read and written only with the mutex held.
#define FP_GUARDED_BY(mutex) FP_THREAD_ATTRIBUTE(guarded_by(mutex))
// Of a function: the caller holds the mutex.
#define FP_REQUIRES(mutex) FP_THREAD_ATTRIBUTE(requires_capability(mutex))

namespace flowprefill {

class FP_THREAD_ATTRIBUTE(capability("mutex")) Mutex {
 public:
  void lock() FP_THREAD_ATTRIBUTE(acquire_capability()) { mutex_.lock(); }
  void unlock() FP_THREAD_ATTRIBUTE(release_capability()) { mutex_.unlock(); }

 private:
  std::mutex mutex_;
};

// Holds a mutex for a scope.
class FP_THREAD_ATTRIBUTE(scoped_lockable) MutexLock {
 public:
  explicit MutexLock(Mutex& mutex) FP_THREAD_ATTRIBUTE(acquire_capability(mutex)) : mutex_(mutex) {
    mutex_.lock();
  }
  ~MutexLock() FP_THREAD_ATTRIBUTE(release_capability()) { mutex_.unlock(); }
  MutexLock(const MutexLock&) = delete;
  MutexLock& operator=(const MutexLock&) = delete;

 private:
  Mutex& mutex_;
};

}  // namespace flowprefill
