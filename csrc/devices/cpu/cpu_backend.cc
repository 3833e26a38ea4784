#include "devices/cpu/cpu_backend.h"

#include <algorithm>
#include <compare>
#include <map>
#include <stdexcept>
#include <utility>

#include "devices/cpu/cpu_program.h"
#include "devices/cpu/cpu_weights.h"
#include "devices/cpu/gemm.h"
#include "devices/cpu/int8_linear.h"
#include "devices/cpu/kv_cache.h"
#include "devices/cpu/packed_linear.h"
#include "runtime/thread_annotations.h"

namespace flowprefill {
namespace {

// Activations kept for later runs: a long prompt's and some short ones'.
constexpr size_t kKeptWorkspaceBytes = size_t{256} << 20;
// A tile gets no fewer rows where the smallest slice of a product exceeds the budget: so many make
// 256 operations of each byte of weights.
constexpr int32_t kLeastTileRows = 256;

// Why the CPU does not take the operator; empty: it does.
std::string refusal_of(const ModelGraph& graph, const Operator& op) {
  if (op.kind == OperatorKind::kLinear && graph.tensor(op.input).columns % 2 != 0)
    return "input columns: got " + std::to_string(graph.tensor(op.input).columns) +
           ", expected an even number";
  return "";
}

// Whether it makes the logits by which rows choose experts: rounding it to bytes would change many
// a choice and save next to nothing.
bool is_router(const ModelGraph& graph, int32_t weight) {
  return std::ranges::any_of(graph.operators, [&](const Operator& op) {
    return op.kind == OperatorKind::kLinear && op.weight == weight &&
           std::ranges::any_of(graph.operators, [&](const Operator& other) {
             return other.kind == OperatorKind::kRoute && other.input == op.output;
           });
  });
}

// In which form the CPU keeps and multiplies a weight.
template <typename T>
MakeLinear<T> make_linear(CpuQuantization quantization) {
  return [quantization](const ModelGraph& graph, int32_t index) -> std::unique_ptr<Linear<T>> {
    const Weight& weight = graph.weights.weight(index);
    if (quantization == CpuQuantization::kInt8 && !is_router(graph, index))
      return std::make_unique<Int8Linear<T>>(weight.columns, weight.rows());
    return std::make_unique<PackedLinear<T>>(weight.columns, weight.rows());
  };
}

template <typename T>
class CpuBackend final : public Backend {
 public:
  CpuBackend(ModelGraph graph, CpuNumbers numbers, int threads, BlockFormats formats)
      : graph_(std::make_shared<ModelGraph>(std::move(graph))),
        threads_(threads),
        cuts_(cpu_cuts(threads, numbers)),
        weights_((check_operators(*graph_, refusal_of),
                  std::make_shared<CpuWeights<T>>(graph_, make_linear<T>(numbers.quantization),
                                                  threads, std::move(formats)))),
        pool_(std::make_shared<BufferPool>(kKeptWorkspaceBytes)) {
    for (size_t i = 0; i < graph_->weights.weights().size(); ++i) {
      const auto index = static_cast<int32_t>(i);
      if (graph_->weights.weight(index).kind == WeightKind::kMatrix)
        graph_->weights.set_stored_bytes(index, weights_->matrix(index).bytes());
    }
  }

  void load(const std::string& source, const float* values, int64_t rows,
            int64_t columns) override {
    weights_->load(source, values, rows, columns);
  }
  void load_blocks(const std::string& source, const uint8_t* bytes, int64_t rows,
                   int64_t row_bytes) override {
    weights_->load_blocks(source, bytes, rows, row_bytes);
  }
  void finish() override {
    weights_->finish();
    is_finished_ = true;
  }
  size_t weight_bytes() const override { return weights_->bytes(); }

  void allocate_cache(int32_t block_tokens, int32_t blocks) override {
    cache_ = std::make_shared<KvCache>(layout(block_tokens, blocks), sizeof(T));
  }
  size_t bytes_per_block(int32_t block_tokens) const override {
    return KvCache::bytes_per_block(layout(block_tokens, 1), sizeof(T));
  }
  KvStore* kv() override { return cache_.get(); }

  std::unique_ptr<ModelProgram> make_program(Batch batch, const PlanOptions& options,
                                             const ProgramOptions& program) override {
    if (!is_finished_ || cache_ == nullptr)
      throw std::logic_error("finish() and allocate_cache() come first");
    check(batch, {.vocab_size = graph_->vocab_size,
                  .block_tokens = cache_->layout().block_tokens,
                  .blocks = cache_->layout().blocks});
    check(program.sampling, batch.num_sequences());
    const auto graph = graph_of({program.output, !program.sampling.empty()});
    CompiledProgram compiled(graph, make_plan(*graph, batch, options, cuts_));
    return std::make_unique<CpuProgram<T>>(std::move(compiled), weights_, cache_, pool_,
                                           std::move(batch), program, threads_);
  }

 private:
  struct Variant {
    RunOutput output = RunOutput::kLogits;
    bool chooses_tokens = false;
    auto operator<=>(const Variant&) const = default;
  };

  // Variants are made when they are first asked for.
  std::shared_ptr<const ModelGraph> graph_of(Variant wanted) {
    if (wanted == Variant{})
      return graph_;
    const MutexLock lock(mutex_);
    auto& variant = variants_[wanted];
    if (variant == nullptr) {
      ModelGraph made = with_output(*graph_, wanted.output);
      if (wanted.chooses_tokens)
        made = with_sampling(std::move(made));
      check_operators(made, refusal_of);
      variant = std::make_shared<const ModelGraph>(std::move(made));
    }
    return variant;
  }

  KvLayout layout(int32_t block_tokens, int32_t blocks) const {
    KvLayout wanted{.layers = graph_->num_layers,
                    .kv_heads = graph_->attention.kv_heads,
                    .head_dim = graph_->attention.head_dim,
                    .block_tokens = block_tokens,
                    .blocks = blocks};
    check(wanted);
    return wanted;
  }

  const std::shared_ptr<ModelGraph> graph_;  // as it is once the constructor has ended
  const int threads_;
  const CutRules cuts_;
  const std::shared_ptr<CpuWeights<T>> weights_;
  const std::shared_ptr<BufferPool> pool_;
  std::shared_ptr<KvCache> cache_;
  bool is_finished_ = false;
  Mutex mutex_;
  std::map<Variant, std::shared_ptr<const ModelGraph>> variants_ FP_GUARDED_BY(mutex_);
};

}  // namespace

CutRules cpu_cuts(int threads, CpuNumbers numbers) {
  int32_t weight_element_bytes = numbers.element == CpuElement::kFloat ? 4 : 2;
  if (numbers.quantization == CpuQuantization::kInt8)
    weight_element_bytes = 1;
  return {.row_step = kRowStep,
          .max_tile_rows = rows_per_member() * threads,
          .min_tile_rows = std::min(kRowStep * threads, kLeastTileRows),
          .min_product_parts = threads,
          .attention_slices = AttentionSlices::kHeadsFirst,
          .slices_products = true,
          .embed_rows = 512,
          .head_tile_rows = kHeadTileRows,
          .costs = {.weight_element_bytes = weight_element_bytes,
                    .embed_row_s = 1.5e-6 / threads,
                    .kept_element_s = 5e-10 / threads,
                    .cache_element_bytes = numbers.element == CpuElement::kFloat ? 4 : 2}};
}

std::unique_ptr<Backend> make_cpu_backend(ModelGraph graph, CpuNumbers numbers, int threads,
                                          BlockFormats formats) {
  if (threads < 1)
    throw std::invalid_argument("threads: got " + std::to_string(threads) +
                                ", expected at least 1");
  if (numbers.quantization == CpuQuantization::kInt8 && !has_int8_gemm()) {
    throw std::invalid_argument(
        "quantization: got int8, but this processor does not multiply bytes natively; expected "
        "none");
  }
  if (numbers.element == CpuElement::kFloat)
    return std::make_unique<CpuBackend<float>>(std::move(graph), numbers, threads,
                                               std::move(formats));
  if (!has_bf16_gemm()) {
    throw std::invalid_argument(
        "dtype: got bf16, but this processor does not multiply bf16 natively; expected f32");
  }
  return std::make_unique<CpuBackend<Bf16>>(std::move(graph), numbers, threads, std::move(formats));
}

}  // namespace flowprefill
