// join_own(): waits for a thread to end, but not in a forked child, which has no thread but the one
// that forked. Used by Executor and, on the CPU, Team, whose copies a child destroys as it ends.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <thread>
#include <utility>

namespace flowprefill {

// Waits for the end of a joinable thread that `process` started. In another process it lets go of
// the thread: to join it would wait for ever, and std::thread ends a process that does not.
inline void join_own(std::thread& thread, pid_t process) {
  if (getpid() == process)
    thread.join();
  else
    new std::thread(std::move(thread));  // never destroyed
}

}  // namespace flowprefill
