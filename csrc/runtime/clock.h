// The one monotonic clock of the engine; used by the executor, the timeline and the bindings.
#pragma once

#include <chrono>
#include <cstdint>

namespace flowprefill {

// Nanoseconds on the steady clock: the same scale and origin as Python's time.monotonic_ns().
inline int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

inline constexpr double to_seconds(int64_t ns) {
  return static_cast<double>(ns) * 1e-9;
}

}  // namespace flowprefill
