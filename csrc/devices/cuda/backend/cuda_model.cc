// CudaModel and its programs. Together since they share the State that both must keep alive.
#include "devices/cuda/backend/cuda_model.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "devices/cuda/backend/batch_inputs.h"
#include "devices/cuda/backend/device_kv_cache.h"
#include "devices/cuda/backend/device_weights.h"
#include "devices/cuda/backend/gemm_candidates.h"
#include "devices/cuda/backend/gemm_products.h"
#include "devices/cuda/backend/layer_kernels.h"
#include "devices/cuda/backend/noise.h"
#include "devices/cuda/backend/plan_builder.h"
#include "devices/cuda/runtime/cuda_device.h"
#include "devices/cuda/runtime/cuda_resources.h"
#include "runtime/thread_annotations.h"

namespace flowprefill {
namespace {

void require(bool holds, const char* field, int64_t value, const char* allowed) {
  if (!holds) {
    throw std::invalid_argument(std::string(field) + ": got " + std::to_string(value) +
                                ", expected " + allowed);
  }
}

// Powers of two, and from 16 the numbers half-way between: padding is at most a half, and for few
// tokens, where weights are read once per step, it costs nothing.
std::vector<int32_t> default_buckets(int32_t max_tokens) {
  std::vector<int32_t> buckets;
  for (int64_t bucket = 1; bucket <= max_tokens; bucket *= 2) {
    buckets.push_back(static_cast<int32_t>(bucket));
    if (bucket >= 16 && bucket + bucket / 2 <= max_tokens)
      buckets.push_back(static_cast<int32_t>(bucket + bucket / 2));
  }
  return buckets;
}

CudaModelOptions checked(CudaModelOptions o) {
  require(o.device >= 0, "device", o.device, "at least 0");
  require(o.run_ahead >= 1 && o.run_ahead <= CudaDevice::kMaxRunAhead, "run_ahead", o.run_ahead,
          "1 to 4");
  require(o.num_lanes >= 1, "num_lanes", o.num_lanes, "at least 1");
  require(o.max_tokens >= 1, "max_tokens", o.max_tokens, "at least 1");
  require(o.max_sequences >= 1, "max_sequences", o.max_sequences, "at least 1");
  require(o.max_context >= 1, "max_context", o.max_context, "at least 1");
  require(o.warm_tokens >= 0, "warm_tokens", o.warm_tokens, "at least 0");
  if (o.buckets.empty())
    o.buckets = default_buckets(o.max_tokens);
  for (size_t i = 0; i < o.buckets.size(); ++i) {
    const int32_t least = i == 0 ? 1 : o.buckets[i - 1] + 1;
    require(o.buckets[i] >= least && o.buckets[i] <= o.max_tokens, "buckets", o.buckets[i],
            "ascending numbers from 1 to max_tokens");
  }
  return o;
}

GemmDevice gemm_device(int device) {
  cudaDeviceProp properties = {};
  FP_CUDA(cudaGetDeviceProperties(&properties, device));
  GemmDevice found{.compute_capability = properties.major * 10 + properties.minor,
                   .num_multiprocessors = properties.multiProcessorCount,
                   .name = properties.name};
  if (found.compute_capability < 80) {
    throw std::invalid_argument("device: got " + std::to_string(device) + " (" + found.name +
                                ", compute capability " + std::to_string(properties.major) + "." +
                                std::to_string(properties.minor) + "), expected 8.0 or more");
  }
  FP_CUDA(cudaDriverGetVersion(&found.driver_version));
  FP_CUDA(cudaRuntimeGetVersion(&found.runtime_version));
  return found;
}

std::unique_ptr<GemmSelector> selector_of(const CudaModelOptions& options) {
  FP_CUDA(cudaSetDevice(options.device));
  return make_gemm_selector(
      gemm_device(options.device),
      {.cache_path = options.gemm_cache_path, .cublas_lt_libraries = options.cublas_lt_libraries});
}

}  // namespace

// Everything on the device. Programs and the device share it, so that it outlives them.
struct CudaModel::State {
  State(ModelConfig model, CudaModelOptions model_options)
      : config(std::move(model)),
        options(checked(std::move(model_options))),
        gemms(selector_of(options)),
        weights(config, options.device) {}
  ~State() { ignore(cudaSetDevice(options.device)); }

  // The sizes of the largest plan there can be.
  PlanSizes largest(int32_t block_tokens) const {
    return {.rows = options.max_tokens,
            .tile_rows = options.max_tokens,
            .sequences = options.max_sequences,
            .table_stride = PlanBuilder::table_stride(
                std::max(options.max_context, options.max_tokens), block_tokens)};
  }

  LaneOptions lane_options(int32_t block_tokens) const {
    const PlanSizes sizes = largest(block_tokens);
    return {.num_lanes = options.num_lanes,
            .lane_bytes = LaneLayout(config, weights.padded_vocab(), sizes).bytes,
            .input_bytes = InputLayout::max_bytes(config, sizes),
            .scratch_bytes = scratch_bytes(
                *gemms, PlanShape(config, weights.padded_vocab(), sizes, {}), weights),
            .device_spill_bytes = options.device_spill_bytes};
  }

  void allocate(int32_t block_tokens, int32_t blocks) {
    cache = std::make_unique<DeviceKvCache>(config, options.device, block_tokens, blocks);
    const LaneOptions lanes = lane_options(block_tokens);
    GraphCacheOptions graphs;
    graphs.max_bytes = options.graph_bytes;
    resources = std::make_shared<CudaResources>(
        CudaOptions{.device = options.device, .lanes = lanes, .graphs = graphs});
    kernels = std::make_unique<LayerKernels>(config, weights, *cache, *gemms, lanes.scratch_bytes);
    PlanBuilderOptions plans{.max_sequences = options.max_sequences, .block_tokens = block_tokens};
    if (options.has_graphs)
      plans.buckets = options.buckets;
    builder =
        std::make_unique<PlanBuilder>(config, weights.padded_vocab(), *kernels, std::move(plans));
  }

  // On the executor's thread, before its first run.
  void prepare(const std::optional<PlanOptions>& warm) {
    resources->lanes().prepare(resources->stream());
    if (options.measures_gemms)
      measure_gemms();
    if (!warm.has_value() || !options.has_graphs)
      return;
    std::vector<GraphCache::Request> requests;
    for (const int32_t bucket : options.buckets) {
      if (bucket > options.warm_tokens)
        break;
      for (const auto& plan : builder->plans_to_warm(bucket, *warm)) {
        auto of_plan = capture_requests(*resources, plan->plan);
        std::move(of_plan.begin(), of_plan.end(), std::back_inserter(requests));
      }
    }
    resources->graphs().warm(std::move(requests));
  }

  void measure_gemms() {
    const PlanShape shape(config, weights.padded_vocab(), largest(cache->block_tokens()), {});
    const LaneView lane = resources->lanes().views().front();
    const std::vector<GemmArgs> products = products_to_measure(shape, weights, lane.activations);
    fill_with_noise({lane.activations, resources->lanes().options().lane_bytes},
                    resources->stream());
    auto reports = gemms->measure_all(
        products, {lane.scratch, resources->lanes().options().scratch_bytes}, resources->stream());
    gemms->prepare(products);
    const MutexLock lock(mutex);
    gemm_reports = std::move(reports);
  }

  BatchLimits limits() const {
    return {.max_tokens = options.max_tokens,
            .max_sequences = options.max_sequences,
            .max_context = options.max_context,
            .block_tokens = cache->block_tokens(),
            .blocks = cache->blocks()};
  }

  const ModelConfig config;
  const CudaModelOptions options;
  const std::unique_ptr<GemmSelector> gemms;
  DeviceWeights weights;
  bool is_finished = false;
  bool has_device = false;
  std::unique_ptr<DeviceKvCache> cache;
  std::shared_ptr<CudaResources> resources;
  std::unique_ptr<LayerKernels> kernels;
  std::unique_ptr<PlanBuilder> builder;
  Mutex mutex;
  std::vector<GemmReport> gemm_reports FP_GUARDED_BY(mutex);
};

// ---- programs

namespace {

class ModelProgram final : public CudaModelProgram {
 public:
  // owner: keeps weights, cache and kernels.
  ModelProgram(std::shared_ptr<const void> owner, std::shared_ptr<CudaResources> resources,
               PlannedBatch planned, const Batch& batch, std::vector<std::byte> inputs,
               const CudaProgramOptions& options)
      : owner_(std::move(owner)),
        plan_(std::move(planned.plan)),
        predicted_s_(std::move(planned.predicted_s)),
        rows_(batch.rows()),
        sequences_(static_cast<int32_t>(batch.sequences.size())),
        options_(options),
        program_(std::move(resources), plan_->plan, rows_, std::move(inputs), fetched()) {}

  size_t size() const override { return program_.size(); }
  size_t live_bytes(size_t cursor) const override { return program_.live_bytes(cursor); }

  SegmentLabel label(size_t i) const override {
    SegmentLabel label = program_.label(i);
    label.predicted_s = predicted_s_[i];
    const Op first = plan_->steps.steps[plan_->steps.segments[i]].first;
    if (first < Op::kFinalNorm) {  // else its rows are sequences or columns
      label.row_begin = std::min(label.row_begin, rows_);
      label.row_end = std::min(label.row_end, rows_);
    }
    return label;
  }

  void execute(size_t i, const ExecutionContext& context) override {
    if (static_cast<int64_t>(i) == options_.fail_at)
      throw std::runtime_error(std::string("injected failure in ") + program_.label(i).op);
    program_.execute(i, context);
  }

  const float* logits() const override {
    if (!options_.fetch_logits)
      return nullptr;
    return reinterpret_cast<const float*>(program_.result().data());
  }
  int64_t logits_stride() const override { return plan_->shape->padded_vocab; }
  std::span<const int32_t> sampled() const override {
    const auto count = static_cast<size_t>(sequences_);
    const std::byte* end = program_.result().data() + program_.result().size();
    return {reinterpret_cast<const int32_t*>(end) - count, count};
  }
  int32_t num_sequences() const override { return sequences_; }
  int32_t vocab_size() const override { return plan_->shape->config.vocab_size; }
  size_t workspace_bytes() const override { return plan_->plan->lane_bytes(); }
  int32_t bucket() const override { return plan_->plan->bucket(); }

 private:
  // Of the sequences alone, without padding: logits if wanted, then tokens.
  std::vector<LiveRange> fetched() const {
    const LaneLayout& lane = plan_->shape->lane;
    const auto count = static_cast<size_t>(sequences_);
    const size_t row_bytes = static_cast<size_t>(plan_->shape->padded_vocab) * sizeof(float);
    std::vector<LiveRange> ranges;
    if (options_.fetch_logits)
      ranges.push_back({lane.logits, count * row_bytes});
    ranges.push_back({lane.tokens, count * sizeof(int32_t)});
    return ranges;
  }

  const std::shared_ptr<const void> owner_;
  const std::shared_ptr<const TransformerPlan> plan_;
  const std::vector<double> predicted_s_;
  const int32_t rows_;
  const int32_t sequences_;
  const CudaProgramOptions options_;
  CudaProgram program_;
};

}  // namespace

// ---- the model

CudaModel::CudaModel(ModelConfig config, CudaModelOptions options)
    : state_(std::make_shared<State>(std::move(config), std::move(options))) {}

CudaModel::~CudaModel() = default;

void CudaModel::load(const std::string& name, const float* values, int64_t rows, int64_t columns) {
  state_->weights.load(name, values, rows, columns);
}

void CudaModel::finish() {
  state_->weights.finish();
  state_->is_finished = true;
}

void CudaModel::allocate_cache(int32_t block_tokens, int32_t blocks) {
  if (state_->builder != nullptr)
    throw std::logic_error("allocate_cache() was called before");
  state_->allocate(block_tokens, blocks);
}

size_t CudaModel::bytes_per_block(int32_t block_tokens) const {
  return DeviceKvCache::bytes_per_block(state_->config, block_tokens);
}

size_t CudaModel::lane_bytes(int32_t block_tokens) const {
  static_cast<void>(bytes_per_block(block_tokens));  // throws if it is no size of a block
  const LaneOptions lanes = state_->lane_options(block_tokens);
  return static_cast<size_t>(lanes.num_lanes) * (lanes.lane_bytes + lanes.input_bytes) +
         lanes.scratch_bytes;
}

void CudaModel::zero_blocks(std::span<const int32_t> blocks) {
  if (state_->cache != nullptr)
    state_->cache->zero(blocks);
}

size_t CudaModel::weight_bytes() const {
  return state_->weights.bytes();
}

const ModelConfig& CudaModel::config() const {
  return state_->config;
}

const CudaModelOptions& CudaModel::options() const {
  return state_->options;
}

std::unique_ptr<Device> CudaModel::make_device(const std::optional<PlanOptions>& warm) {
  if (!state_->is_finished || state_->builder == nullptr)
    throw std::logic_error("finish() and allocate_cache() come first");
  if (std::exchange(state_->has_device, true))
    throw std::logic_error("make_device() was called before: one executor owns the GPU's stream");
  CudaDeviceOptions options;
  options.run_ahead = state_->options.run_ahead;
  options.spin_s = state_->options.spin_s;
  std::optional<PlanOptions> own = warm;
  if (own.has_value())
    own = on_device(*own);
  options.prepare = [state = state_, own] { state->prepare(own); };
  return std::make_unique<CudaDevice>(state_->resources, std::move(options));
}

std::unique_ptr<CudaModelProgram> CudaModel::make_program(const Batch& batch,
                                                          const PlanOptions& options,
                                                          std::span<const SamplingParams> sampling,
                                                          const CudaProgramOptions& program) {
  if (!state_->is_finished || state_->builder == nullptr)
    throw std::logic_error("finish() and allocate_cache() come first");
  check_batch(state_->config, batch, state_->limits());
  check_sampling(sampling, batch.sequences.size());
  PlannedBatch planned = state_->builder->plan_for(batch, on_device(options));
  std::vector<std::byte> inputs =
      batch_inputs(*planned.plan->shape, batch, state_->cache->block_tokens(), sampling);
  return std::make_unique<ModelProgram>(state_, state_->resources, std::move(planned), batch,
                                        std::move(inputs), program);
}

PlanOptions CudaModel::on_device(PlanOptions options) const {
  options.threads = 1;
  options.element_bytes = sizeof(Bf16);
  options.cuts = state_->options.cuts;
  options.cuts.slices_heads = false;  // the attention kernel takes all heads
  return options;
}

GraphReport CudaModel::graph_report() const {
  return state_->resources == nullptr ? GraphReport{} : state_->resources->graphs().report();
}

LaneReport CudaModel::lane_report() const {
  return state_->resources == nullptr ? LaneReport{} : state_->resources->lanes().report();
}

std::vector<GemmReport> CudaModel::gemm_report() const {
  const MutexLock lock(state_->mutex);
  return state_->gemm_reports;
}

}  // namespace flowprefill
