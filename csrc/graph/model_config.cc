#include "graph/model_config.h"

#include <stdexcept>
#include <string>

namespace flowprefill {
namespace {

void require(bool holds, const char* field, int64_t value, const char* allowed) {
  if (holds)
    return;
  throw std::invalid_argument(std::string(field) + ": got " + std::to_string(value) +
                              ", expected " + allowed);
}

}  // namespace

void check(const ModelConfig& c) {
  require(c.vocab_size > 0, "vocab_size", c.vocab_size, "at least 1");
  require(c.num_layers > 0, "num_layers", c.num_layers, "at least 1");
  require(c.hidden_size > 0 && c.hidden_size % 2 == 0, "hidden_size", c.hidden_size,
          "an even number");
  require(c.intermediate_size > 0 && c.intermediate_size % 2 == 0, "intermediate_size",
          c.intermediate_size, "an even number");
  require(c.head_dim > 0 && c.head_dim % 2 == 0 && c.head_dim <= 512, "head_dim", c.head_dim,
          "an even number up to 512");
  require(c.num_heads > 0, "num_heads", c.num_heads, "at least 1");
  require(c.num_kv_heads > 0 && c.num_heads % c.num_kv_heads == 0, "num_kv_heads", c.num_kv_heads,
          "a divisor of num_heads");
  require(c.windows.size() == static_cast<size_t>(c.num_layers), "windows",
          static_cast<int64_t>(c.windows.size()), "one per layer");
  require(c.inverse_frequencies.size() == static_cast<size_t>(c.head_dim / 2),
          "inverse_frequencies", static_cast<int64_t>(c.inverse_frequencies.size()),
          "head_dim / 2 numbers");
}

}  // namespace flowprefill
