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

}  // namespace flowprefill
