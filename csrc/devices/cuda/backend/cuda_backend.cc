#include "devices/cuda/backend/cuda_backend.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <stdexcept>
#include <utility>

#include "devices/cuda/backend/batch_inputs.h"
#include "devices/cuda/backend/cuda_model_program.h"
#include "devices/cuda/backend/device_kv_cache.h"
#include "devices/cuda/backend/device_weights.h"
#include "devices/cuda/backend/gemm_candidates.h"
#include "devices/cuda/backend/gemm_products.h"
#include "devices/cuda/backend/noise.h"
#include "devices/cuda/backend/operator_kernels.h"
#include "devices/cuda/backend/plan_builder.h"
#include "devices/cuda/backend/refusal.h"
#include "devices/cuda/kernels/kernels.h"
#include "devices/cuda/runtime/cuda_device.h"
#include "devices/cuda/runtime/cuda_resources.h"
#include "runtime/thread_annotations.h"

namespace flowprefill {
namespace {

// With what the planner has to know of weights that are not bf16.
std::shared_ptr<const ModelGraph> lowered(ModelGraph graph, const CudaBackendOptions& options) {
  auto own = std::make_shared<ModelGraph>(with_sampling(std::move(graph)));
  check_operators(*own, refusal_of);
  const std::vector<bool> is_fp8 = fp8_weights(*own, options);
  for (size_t i = 0; i < is_fp8.size(); ++i) {
    const auto index = static_cast<int32_t>(i);
    if (is_fp8[i])
      own->weights.set_stored_bytes(index,
                                    DeviceWeights::bytes_of(own->weights.weight(index), true));
  }
  return own;
}

constexpr RunOutput kOutputs[] = {RunOutput::kLogits, RunOutput::kScores, RunOutput::kLast,
                                  RunOutput::kMean};

// Throws std::invalid_argument if the model or the device cannot give it.
std::shared_ptr<const ModelGraph> variant_of(const ModelGraph& graph, RunOutput output) {
  auto own = std::make_shared<const ModelGraph>(with_output(graph, output));
  check_operators(*own, refusal_of);
  return own;
}

using Graphs = std::map<RunOutput, std::shared_ptr<const ModelGraph>>;

// Of all outputs that the model can give. The others are refused when they are asked for.
Graphs variants_of(const std::shared_ptr<const ModelGraph>& graph) {
  Graphs graphs = {{RunOutput::kLogits, graph}};
  for (const RunOutput output : kOutputs) {
    try {
      if (output != RunOutput::kLogits)
        graphs[output] = variant_of(*graph, output);
    } catch (const std::invalid_argument&) {
      continue;
    }
  }
  return graphs;
}

GemmDevice gemm_device(int device) {
  FP_CUDA(cudaSetDevice(device));
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

// Throws std::invalid_argument where Hopper's kernel is asked for and cannot run.
bool uses_hopper_attention(const CudaBackendOptions& options, const GemmDevice& card,
                           const ModelGraph& graph) {
  if (options.attention == "portable")
    return false;
  const bool can = card.compute_capability == 90 && has_hopper_attention() &&
                   has_hopper_head_size(graph.attention.head_dim);
  if (!can && options.attention == "hopper") {
    throw std::invalid_argument(
        "attention: got 'hopper', expected portable or auto: that kernel needs compute capability "
        "9.0 (this is " +
        std::to_string(card.compute_capability / 10) + "." +
        std::to_string(card.compute_capability % 10) + "), heads of 64, 128 or 256 (the model's: " +
        std::to_string(graph.attention.head_dim) + ") and a build with FlashInfer's headers (" +
        (has_hopper_attention() ? "it has them)" : "it has none)"));
  }
  return can;
}

std::unique_ptr<GemmSelector> selector_of(const CudaBackendOptions& options,
                                          const GemmDevice& device, std::string* library_failure) {
  return make_gemm_selector(
      device,
      {.cache_path = options.gemm_cache_path, .cublas_lt_libraries = options.cublas_lt_libraries},
      library_failure);
}

}  // namespace

// Everything on the device. Programs and the device share it, so that it outlives them.
struct CudaBackend::State {
  State(ModelGraph model, CudaBackendOptions model_options)
      : options(checked(std::move(model_options))),
        graph(lowered(std::move(model), options)),
        variants(variants_of(graph)),
        card(gemm_device(options.device)),
        uses_hopper(uses_hopper_attention(options, card, *graph)),
        gemms(selector_of(options, card, &library_failure)),
        shared_weights(std::make_shared<DeviceWeights>(
            *graph, options.device, DeviceWeights::kPieceBytes, fp8_weights(*graph, options))),
        weights(*shared_weights) {}
  State(const State& other, CudaBackendOptions model_options)
      : options(checked(other.shared_with(std::move(model_options)))),
        graph(other.graph),
        variants(other.variants),
        card(gemm_device(options.device)),
        uses_hopper(uses_hopper_attention(options, card, *graph)),
        gemms(selector_of(options, card, &library_failure)),
        shared_weights(other.shared_weights),
        weights(*shared_weights),
        is_finished(true) {}
  ~State() { ignore(cudaSetDevice(options.device)); }

  // The options of a model with these weights.
  CudaBackendOptions shared_with(CudaBackendOptions wanted) const {
    if (!is_finished)
      throw std::logic_error("the other model's finish() comes first");
    if (wanted.device != options.device) {
      throw std::invalid_argument("device: got " + std::to_string(wanted.device) + ", expected " +
                                  std::to_string(options.device) +
                                  ", that of the model whose weights are shared");
    }
    return wanted;
  }

  // Of the largest plan there can be.
  PlanShape largest(const ModelGraph& of, int32_t block_tokens) const {
    const PlanSizes sizes{
        .rows = options.max_tokens,
        .tile_rows = options.max_tokens,
        .sequences = options.max_sequences,
        .head_tile_rows = std::min(options.cuts.head_tile_rows, options.max_tokens)};
    const int32_t longest = std::max(options.max_context, options.max_tokens);
    return {of, sizes, PlanBuilder::table_stride(longest, block_tokens), rules(block_tokens), {}};
  }

  AttentionRules rules(int32_t block_tokens) const {
    return {*graph, card.num_multiprocessors, block_tokens, uses_hopper};
  }

  LaneOptions lane_options(int32_t block_tokens) const {
    const PlanShape shape = largest(*graph, block_tokens);
    size_t lane_bytes = 0;
    for (const auto& [output, of] : variants)
      lane_bytes = std::max(lane_bytes, largest(*of, block_tokens).lane.bytes());
    return {.num_lanes = options.num_lanes,
            .lane_bytes = lane_bytes,
            .input_bytes = InputLayout::max_bytes(*graph, shape.sizes(), shape.inputs.table_stride,
                                                  shape.rules),
            .scratch_bytes = std::max(scratch_bytes(*gemms, shape, weights), shape.scratch_bytes()),
            .device_spill_bytes = options.device_spill_bytes};
  }

  void allocate(const KvLayout& layout) {
    cache = std::make_unique<DeviceKvCache>(layout, options.device);
    const LaneOptions lanes = lane_options(layout.block_tokens);
    GraphCacheOptions graphs;
    graphs.max_bytes = options.graph_bytes;
    resources = std::make_shared<CudaResources>(
        CudaOptions{.device = options.device, .lanes = lanes, .graphs = graphs});
    kernels = std::make_unique<OperatorKernels>(weights, *cache, *gemms, lanes.scratch_bytes);
    gemms->prepare(products_to_choose(largest(*graph, layout.block_tokens), weights,
                                      OperatorKernels::nowhere()));
    PlanBuilderOptions plans{.max_sequences = options.max_sequences,
                             .block_tokens = layout.block_tokens,
                             .multiprocessors = card.num_multiprocessors,
                             .uses_hopper_attention = uses_hopper,
                             .cuts = options.cuts};
    plans.cuts.multiprocessors = card.num_multiprocessors;
    plans.cuts.chunks_keys = plans.cuts.chunks_keys && uses_hopper;
    if (options.has_graphs)
      plans.buckets = options.buckets;
    for (const auto& [output, of] : variants) {
      plans.output = output;
      builders[output] = std::make_unique<PlanBuilder>(of, *kernels, plans);
    }
  }

  // On the executor's thread, before its first run.
  void prepare(const std::optional<PlanOptions>& warm) {
    resources->lanes().prepare(resources->stream());
    if (options.measures_gemms && (options.measures_cublas_lt || !library_failure.empty()))
      measure_gemms();
    if (!warm.has_value() || !options.has_graphs)
      return;
    std::vector<GraphCache::Request> requests;
    for (const int32_t bucket : options.buckets) {
      if (bucket > options.warm_tokens)
        break;
      for (const auto& plan : builders.at(RunOutput::kLogits)->plans_to_warm(bucket, *warm)) {
        auto of_plan = capture_requests(*resources, plan->plan);
        std::move(of_plan.begin(), of_plan.end(), std::back_inserter(requests));
      }
    }
    resources->graphs().warm(std::move(requests));
  }

  void measure_gemms() {
    const PlanShape shape = largest(*graph, cache->layout().block_tokens);
    const LaneView lane = resources->lanes().views().front();
    const std::vector<GemmArgs> products = products_to_choose(shape, weights, lane.activations);
    fill_with_noise({lane.activations, resources->lanes().options().lane_bytes},
                    resources->stream());
    auto reports = gemms->measure_all(
        products, {lane.scratch, resources->lanes().options().scratch_bytes}, resources->stream());
    gemms->prepare(products);
    const MutexLock lock(mutex);
    gemm_reports = std::move(reports);
  }

  BatchLimits limits() const {
    return {.vocab_size = graph->vocab_size,
            .block_tokens = cache->layout().block_tokens,
            .blocks = cache->layout().blocks,
            .max_tokens = options.max_tokens,
            .max_sequences = options.max_sequences,
            .max_context = options.max_context};
  }

  const CudaBackendOptions options;
  const std::shared_ptr<const ModelGraph> graph;
  const Graphs variants;  // by output; that of the logits is `graph`
  const GemmDevice card;
  const bool uses_hopper;
  std::string library_failure;  // why there is no cuBLASLt; empty: it is there
  const std::unique_ptr<GemmSelector> gemms;
  const std::shared_ptr<DeviceWeights> shared_weights;  // with models made from this one
  DeviceWeights& weights;
  bool is_finished = false;
  bool has_device = false;
  std::unique_ptr<DeviceKvCache> cache;
  std::shared_ptr<CudaResources> resources;
  std::unique_ptr<OperatorKernels> kernels;
  std::map<RunOutput, std::unique_ptr<PlanBuilder>> builders;  // of `variants`
  Mutex mutex;
  std::vector<GemmReport> gemm_reports FP_GUARDED_BY(mutex);
};

CudaBackend::CudaBackend(ModelGraph graph, CudaBackendOptions options)
    : state_(std::make_shared<State>(std::move(graph), std::move(options))) {}

CudaBackend::CudaBackend(const CudaBackend& weights_of, CudaBackendOptions options)
    : state_(std::make_shared<State>(*weights_of.state_, std::move(options))) {}

CudaBackend::~CudaBackend() = default;

void CudaBackend::load(const std::string& source, const float* values, int64_t rows,
                       int64_t columns) {
  state_->weights.load(source, values, rows, columns);
}

void CudaBackend::load_blocks(const std::string& source, const uint8_t* bytes, int64_t rows,
                              int64_t row_bytes) {
  if (std::ranges::find(state_->options.fp8_sources, source) == state_->options.fp8_sources.end())
    throw std::logic_error("tensor " + source + ": came in blocks, which was not announced");
  state_->weights.load_blocks(source, bytes, rows, row_bytes);
}

void CudaBackend::finish() {
  state_->weights.finish();
  state_->is_finished = true;
}

size_t CudaBackend::weight_bytes() const {
  return state_->weights.bytes();
}

// ---- the cache

KvLayout CudaBackend::kv_layout(int32_t block_tokens, int32_t blocks) const {
  const ModelGraph& graph = *state_->graph;
  return {.layers = graph.num_layers,
          .kv_heads = graph.attention.kv_heads,
          .head_dim = graph.attention.head_dim,
          .block_tokens = block_tokens,
          .blocks = blocks};
}

void CudaBackend::allocate_cache(int32_t block_tokens, int32_t blocks) {
  if (!state_->builders.empty())
    throw std::logic_error("allocate_cache() was called before");
  state_->allocate(kv_layout(block_tokens, blocks));
}

size_t CudaBackend::bytes_per_block(int32_t block_tokens) const {
  return DeviceKvCache::bytes_per_block(kv_layout(block_tokens, 1));
}

size_t CudaBackend::lane_bytes(int32_t block_tokens) const {
  static_cast<void>(bytes_per_block(block_tokens));  // throws if it is no size of a block
  const LaneOptions lanes = state_->lane_options(block_tokens);
  return static_cast<size_t>(lanes.num_lanes) * (lanes.lane_bytes + lanes.input_bytes) +
         lanes.scratch_bytes;
}

KvStore* CudaBackend::kv() {
  return state_->builders.empty() ? nullptr : state_->cache.get();
}

// ---- device and programs

void CudaBackend::require_ready() const {
  if (!state_->is_finished || state_->builders.empty())
    throw std::logic_error("finish() and allocate_cache() come first");
}

std::unique_ptr<Device> CudaBackend::make_device(const std::optional<PlanOptions>& warm) {
  require_ready();
  if (std::exchange(state_->has_device, true))
    throw std::logic_error("make_device() was called before: one executor owns the GPU's stream");
  CudaDeviceOptions options;
  options.run_ahead = state_->options.run_ahead;
  options.launches_late = state_->options.launches_late;
  options.spin_s = state_->options.spin_s;
  options.anchor_s = state_->options.anchor_s;
  options.prepare = [state = state_, warm] { state->prepare(warm); };
  return std::make_unique<CudaDevice>(state_->resources, std::move(options));
}

std::unique_ptr<ModelProgram> CudaBackend::make_program(Batch batch, const PlanOptions& options,
                                                        const ProgramOptions& program) {
  require_ready();
  const auto builder = state_->builders.find(program.output);
  if (builder == state_->builders.end()) {
    static_cast<void>(variant_of(*state_->graph, program.output));  // says why
    throw std::invalid_argument("output: the model has no such output");
  }
  check(batch, state_->limits());
  check(program.sampling, batch.num_sequences());
  PlannedBatch planned = builder->second->plan_for(batch, options);
  std::vector<std::byte> inputs = batch_inputs(*planned.plan->shape, batch, program.sampling);
  return std::make_unique<CudaModelProgram>(state_, state_->resources, std::move(planned), batch,
                                            std::move(inputs), program);
}

// ---- reports

const std::string& CudaBackend::library_failure() const {
  return state_->library_failure;
}

std::string CudaBackend::gemm_cache_failure() const {
  return state_->gemms->cache_failure();
}

GraphReport CudaBackend::graph_report() const {
  return state_->resources == nullptr ? GraphReport{} : state_->resources->graphs().report();
}

LaneReport CudaBackend::lane_report() const {
  return state_->resources == nullptr ? LaneReport{} : state_->resources->lanes().report();
}

std::vector<GemmReport> CudaBackend::gemm_report() const {
  const MutexLock lock(state_->mutex);
  return state_->gemm_reports;
}

}  // namespace flowprefill
