#include "devices/cuda/backend/cuda_backend_options.h"

#include <stdexcept>

#include "devices/cuda/runtime/bucket.h"
#include "devices/cuda/runtime/cuda_device.h"

namespace flowprefill {
namespace {

void require(bool holds, const char* field, int64_t value, const char* allowed) {
  if (!holds) {
    throw std::invalid_argument(std::string(field) + ": got " + std::to_string(value) +
                                ", expected " + allowed);
  }
}

}  // namespace

CudaBackendOptions checked(CudaBackendOptions o) {
  require(o.device >= 0, "device", o.device, "at least 0");
  require(o.run_ahead >= 1 && o.run_ahead <= CudaDevice::kMaxRunAhead, "run_ahead", o.run_ahead,
          "1 to 4");
  require(o.num_lanes >= 1, "num_lanes", o.num_lanes, "at least 1");
  require(o.max_tokens >= 1, "max_tokens", o.max_tokens, "at least 1");
  require(o.max_sequences >= 1, "max_sequences", o.max_sequences, "at least 1");
  require(o.max_context >= 1, "max_context", o.max_context, "at least 1");
  require(o.warm_tokens >= 0, "warm_tokens", o.warm_tokens, "at least 0");
  if (o.attention != "portable" && o.attention != "hopper" && o.attention != "auto") {
    throw std::invalid_argument("attention: got '" + o.attention +
                                "', expected portable, hopper or auto");
  }
  if (o.buckets.empty())
    o.buckets = default_buckets(o.max_tokens);
  for (size_t i = 0; i < o.buckets.size(); ++i) {
    const int32_t least = i == 0 ? 1 : o.buckets[i - 1] + 1;
    require(o.buckets[i] >= least && o.buckets[i] <= o.max_tokens, "buckets", o.buckets[i],
            "ascending numbers from 1 to max_tokens");
  }
  return o;
}

}  // namespace flowprefill
