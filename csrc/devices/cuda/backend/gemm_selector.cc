#include "devices/cuda/backend/gemm_selector.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <stdexcept>
#include <utility>

#include "devices/cuda/runtime/stream_event.h"

namespace flowprefill {
namespace {

constexpr int kRounds = 5;           // an odd number: the median is one of them
constexpr double kRoundUs = 1000;    // long enough that an event's resolution is 0.1 %
constexpr double kMaxLaunches = 64;  // per round

// The guess is made for the shape, so that what runs depends on it alone.
GemmArgs standing_for_shape(GemmArgs args) {
  const GemmShape shape = shape_of(args);
  args.row_begin = 0;
  args.row_end = shape.rows;
  args.columns = shape.columns;
  return args;
}

// Whether the candidate alone is at fault: a library that has no kernel for this product, a launch
// that is not possible. Anything else is the device's failure, and the run's.
bool is_refusal(const std::runtime_error& error) {
  const auto* of_cuda = dynamic_cast<const CudaError*>(&error);
  if (of_cuda == nullptr)
    return true;
  switch (of_cuda->code()) {
    case cudaErrorInvalidValue:
    case cudaErrorInvalidConfiguration:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidKernelImage:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorLaunchOutOfResources:
    case cudaErrorNotSupported:
      return true;
    default:
      return false;
  }
}

// Calls `use` with one candidate after the other, from *first on, until one does not refuse, and
// leaves *first there. If all refuse it throws what the first said, and *first stays.
template <typename Use>
void use_first_that_can(const std::vector<GemmCandidate>& candidates, std::atomic<size_t>* first,
                        const Use& use) {
  std::exception_ptr refusal;
  const size_t begin = first->load();
  for (size_t i = begin; i < candidates.size(); ++i) {
    try {
      use(candidates[i]);
      if (i != begin)
        first->store(i);
      return;
    } catch (const std::runtime_error& error) {
      if (!is_refusal(error))
        throw;
      if (refusal == nullptr)
        refusal = std::current_exception();
    }
  }
  std::rethrow_exception(refusal);
}

// A candidate while it is measured.
struct Contestant {
  GemmCandidate candidate;
  int launches = 1;  // per round
  std::vector<double> us = {};
  std::string failure = {};

  double median_us() const {
    std::vector<double> sorted = us;
    std::sort(sorted.begin(), sorted.end());
    return sorted[sorted.size() / 2];
  }
};

class Measurement {
 public:
  Measurement(std::span<const GemmArgs> products, std::span<std::byte> scratch, cudaStream_t stream)
      : products_(products), scratch_(scratch), stream_(stream) {}

  // Has the contestant get ready; its failure is set if it refuses.
  void prepare(Contestant* contestant) const {
    try {
      if (contestant->candidate.prepare)
        contestant->candidate.prepare(products_.front());
    } catch (const std::exception& error) {
      contestant->failure = error.what();
    }
  }

  // Time between two events around `contestant.launches` launches, per launch, in us;
  // negative and contestant.failure set if one was refused. Throws CudaError where the device
  // fails.
  double time_us(Contestant* contestant) {
    start_.record(stream_, kContext);
    for (int i = 0; i < contestant->launches && contestant->failure.empty(); ++i)
      contestant->failure = refusal(contestant->candidate);
    stop_.record(stream_, kContext);
    stop_.wait(kContext);
    if (!contestant->failure.empty())
      return -1;
    return static_cast<double>(stop_.ns_since(start_, kContext)) / 1e3 / contestant->launches;
  }

 private:
  static constexpr CallContext kContext = {"measure_gemm", -1};

  // Launches the next product's; returns what speaks against it.
  std::string refusal(const GemmCandidate& candidate) {
    const GemmArgs& args = products_[next_++ % products_.size()];
    try {
      check(candidate.launch(args, scratch_, stream_), candidate.name.c_str());
      return {};
    } catch (const std::exception& error) {
      return error.what();
    }
  }

  const std::span<const GemmArgs> products_;
  const std::span<std::byte> scratch_;
  const cudaStream_t stream_;
  const StreamEvent start_ = StreamEvent::make();
  const StreamEvent stop_ = StreamEvent::make();
  size_t next_ = 0;
};

// Rounds go around the candidates, so that a clock that falls while the GPU warms up is charged to
// all of them alike.
void measure_contestants(std::vector<Contestant>* contestants, Measurement* measurement) {
  for (Contestant& contestant : *contestants) {
    measurement->prepare(&contestant);
    measurement->time_us(&contestant);  // loads the kernel
    const double us = contestant.failure.empty() ? measurement->time_us(&contestant) : 0;
    contestant.launches =
        static_cast<int>(std::clamp(kRoundUs / std::max(us, 1.0), 1.0, kMaxLaunches));
  }
  for (int round = 0; round < kRounds; ++round) {
    for (Contestant& contestant : *contestants) {
      if (contestant.failure.empty())
        contestant.us.push_back(measurement->time_us(&contestant));
    }
  }
}

}  // namespace

GemmSelector::GemmSelector(GemmDevice device, std::string cache_path, GemmCandidates candidates)
    : device_(std::move(device)),
      cache_path_(std::move(cache_path)),
      candidates_(std::move(candidates)),
      choices_(cache_path_.empty() ? GemmChoices{} : read_gemm_choices(cache_path_, device_)) {}

size_t GemmSelector::scratch_bytes(const GemmArgs& args) const {
  size_t bytes = 0;
  for (const GemmCandidate& candidate : candidates_(args))
    bytes = std::max(bytes, candidate.scratch_bytes);
  return bytes;
}

void GemmSelector::prepare(std::span<const GemmArgs> products) const {
  for (const GemmArgs& args : products) {
    const std::shared_ptr<Ranking> ranking = ranking_of(args);
    if (ranking->is_prepared)
      continue;
    try {
      use_first_that_can(ranking->candidates, &ranking->first, [&args](const GemmCandidate& c) {
        if (c.prepare)
          c.prepare(args);
      });
      ranking->is_prepared = true;
    } catch (const std::runtime_error&) {
      ranking->is_prepared = true;  // all refuse: the launch says so, and of which operator
    }
  }
}

void GemmSelector::launch(const GemmArgs& args, std::span<std::byte> scratch, cudaStream_t stream,
                          const CallContext& context) const {
  const std::shared_ptr<Ranking> ranking = ranking_of(args);
  use_first_that_can(ranking->candidates, &ranking->first, [&](const GemmCandidate& candidate) {
    check(candidate.launch(args, scratch, stream), candidate.name.c_str(), context);
  });
}

int32_t GemmSelector::num_kernels(const GemmArgs& args) const {
  const std::shared_ptr<Ranking> ranking = ranking_of(args);
  return ranking->candidates[ranking->first].kernels_of(args);
}

bool GemmSelector::chooses(const GemmArgs& args, std::string_view name) const {
  const std::shared_ptr<Ranking> ranking = ranking_of(args);
  return ranking->candidates[ranking->first].name == name;
}

std::shared_ptr<GemmSelector::Ranking> GemmSelector::ranking_of(const GemmArgs& args) const {
  const GemmShape shape = shape_of(args);
  const MutexLock lock(mutex_);
  std::shared_ptr<Ranking>& known = rankings_[shape];
  if (known != nullptr)
    return known;
  std::vector<GemmCandidate> candidates = candidates_(standing_for_shape(args));
  if (candidates.empty()) {
    throw std::invalid_argument("GEMM: no kernel for compute capability " +
                                std::to_string(device_.compute_capability) +
                                ", expected 80 or more");
  }
  if (const auto measured = choices_.find(shape); measured != choices_.end()) {
    // A file may name what this build does not have: the guess stays first then.
    const auto pick = std::ranges::find(candidates, measured->second, &GemmCandidate::name);
    if (pick != candidates.end())
      std::rotate(candidates.begin(), pick, pick + 1);
  }
  known = std::make_shared<Ranking>();
  known->candidates = std::move(candidates);
  return known;
}

GemmReport GemmSelector::measure(const GemmShape& shape, std::span<const GemmArgs> products,
                                 std::span<std::byte> scratch, cudaStream_t stream) {
  std::vector<Contestant> contestants;
  for (GemmCandidate& candidate : candidates_(standing_for_shape(products.front())))
    contestants.push_back({.candidate = std::move(candidate)});
  Measurement measurement(products, scratch, stream);
  measure_contestants(&contestants, &measurement);
  GemmReport report = {.shape = shape, .rows = products.front().rows()};
  const Contestant* best = nullptr;
  for (const Contestant& contestant : contestants) {
    const bool is_measured = contestant.failure.empty();
    report.timings.push_back({.candidate = contestant.candidate.name,
                              .us = is_measured ? contestant.median_us() : 0,
                              .failure = contestant.failure});
    // Among equals the better guess stays.
    if (is_measured && (best == nullptr || contestant.median_us() < best->median_us()))
      best = &contestant;
  }
  if (best != nullptr)
    report.chosen = best->candidate.name;
  return report;
}

std::vector<GemmReport> GemmSelector::measure_all(std::span<const GemmArgs> products,
                                                  std::span<std::byte> scratch,
                                                  cudaStream_t stream) {
  std::map<GemmShape, std::vector<GemmArgs>> by_shape;
  for (const GemmArgs& args : products)
    by_shape[shape_of(args)].push_back(args);
  std::vector<GemmReport> reports;
  bool is_new = false;
  for (const auto& [shape, of_shape] : by_shape) {
    {
      const MutexLock lock(mutex_);
      if (const auto known = choices_.find(shape); known != choices_.end()) {
        reports.push_back({.shape = shape,
                           .rows = of_shape.front().rows(),
                           .chosen = known->second,
                           .is_from_cache = true});
        continue;
      }
    }
    reports.push_back(measure(shape, of_shape, scratch, stream));
    if (reports.back().chosen.empty())
      continue;
    const MutexLock lock(mutex_);
    choices_[shape] = reports.back().chosen;
    rankings_.erase(shape);
    is_new = true;
  }
  const MutexLock lock(mutex_);
  cache_failure_.clear();
  try {
    if (is_new && !cache_path_.empty())
      write_gemm_choices(cache_path_, device_, choices_);
  } catch (const std::runtime_error& error) {
    cache_failure_ = error.what();
  }
  return reports;
}

std::string GemmSelector::cache_failure() const {
  const MutexLock lock(mutex_);
  return cache_failure_;
}

}  // namespace flowprefill
