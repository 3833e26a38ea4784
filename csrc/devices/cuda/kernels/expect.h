// expect(): the check that every kernel's arguments go through before a launch. Host only.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace flowprefill {

// Throws std::invalid_argument "field: got value, expected allowed" unless `holds`.
inline void expect(bool holds, const char* field, int64_t value, const char* allowed) {
  if (!holds) {
    throw std::invalid_argument(std::string(field) + ": got " + std::to_string(value) +
                                ", expected " + allowed);
  }
}

// Throws unless `pointer` is a multiple of `bytes`: 16, or 8. Null passes.
inline void expect_aligned(const char* field, const void* pointer, uintptr_t bytes = 16) {
  const uintptr_t rest = reinterpret_cast<uintptr_t>(pointer) % bytes;
  expect(rest == 0, field, static_cast<int64_t>(rest),
         bytes == 16 ? "an address with remainder 0 by 16" : "an address with remainder 0 by 8");
}

}  // namespace flowprefill
