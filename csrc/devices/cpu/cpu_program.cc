#include "devices/cpu/cpu_program.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "devices/cpu/experts.h"
#include "devices/cpu/gemm.h"
#include "devices/cpu/team.h"

namespace flowprefill {
namespace {

constexpr int32_t kRowOpChunk = 4;  // rows a member takes at once of light operators alone
// Rows that a member takes through a chain of operators at once.
struct RowChunk {
  int32_t least;  // with fewer for each member, columns are shared out instead
  int32_t most;   // what one operator hands to the next stays in L2
};
RowChunk row_chunk() {
  return has_amx() ? RowChunk{128, 256} : RowChunk{64, 64};
}

// Weights up to this size stay in the cache that the cores share while each member reads them for
// rows of its own. A constant: what a virtual machine says of its cache is often the whole host's.
constexpr size_t kCachedWeightBytes = size_t{8} << 20;

std::atomic<size_t> live_workspace{0};
std::atomic<int64_t> num_programs{0};  // made so far

// Whose rows a prepared input holds. Programs have numbers: a new one may lie where another lay.
struct PreparedInput {
  int64_t program = -1;
  const Operator* op = nullptr;
  int32_t row_begin = 0;
  int32_t row_end = 0;

  bool operator==(const PreparedInput&) const = default;
};

}  // namespace

int32_t rows_per_member() {
  return has_amx() ? 256 : 128;
}

size_t live_workspace_bytes() {
  return live_workspace.load(std::memory_order_relaxed);
}

template <typename T>
CpuProgram<T>::CpuProgram(CompiledProgram compiled, std::shared_ptr<const CpuWeights<T>> weights,
                          std::shared_ptr<KvCache> cache, std::shared_ptr<BufferPool> pool,
                          Batch batch, const ProgramOptions& options, int threads)
    : compiled_(std::move(compiled)),
      weights_(std::move(weights)),
      cache_(std::move(cache)),
      pool_(std::move(pool)),
      batch_(std::move(batch)),
      sampling_(options.sampling.begin(), options.sampling.end()),
      threads_(threads),
      number_(num_programs.fetch_add(1, std::memory_order_relaxed)),
      has_logits_(options.fetch_logits && compiled_.graph().logits() >= 0),
      fail_at_(options.fail_at),
      activations_{.graph = compiled_.graph(),
                   .weights = *weights_,
                   .cache = *cache_,
                   .batch = batch_,
                   .sampling = sampling_,
                   .sequence_of_row = sequence_of_rows(batch_),
                   .tensors = std::vector<Buffer>(compiled_.graph().tensors.size())},
      operators_(activations_) {
  try {
    take_missing();
  } catch (...) {  // no destructor follows
    give_all();
    throw;
  }
}

template <typename T>
CpuProgram<T>::~CpuProgram() {
  give_all();
}

// ---- memory

template <typename T>
size_t CpuProgram<T>::tensor_bytes(int32_t tensor) const {
  const Tensor& t = compiled_.graph().tensor(tensor);
  const ElementBytes elements{.activation = sizeof(T), .product = sizeof(float)};
  int32_t rows = batch_.num_sequences();
  if (t.extent == Extent::kPrompt)
    rows = batch_.rows();
  else if (t.extent == Extent::kTile)
    rows = compiled_.plan().tile_rows;
  else if (t.extent == Extent::kHeadTile)
    rows = compiled_.plan().head_tile_rows;
  return static_cast<size_t>(rows) * static_cast<size_t>(t.columns) *
         static_cast<size_t>(elements.of(t.type));
}

template <typename T>
void CpuProgram<T>::take_missing() {
  for (size_t i = 0; i < activations_.tensors.size(); ++i) {
    Buffer& buffer = activations_.tensors[i];
    if (buffer.bytes() > 0)
      continue;
    buffer = pool_->take(tensor_bytes(static_cast<int32_t>(i)));
    live_workspace.fetch_add(buffer.bytes(), std::memory_order_relaxed);
  }
  is_missing_some_ = false;
}

template <typename T>
void CpuProgram<T>::give(Buffer& buffer) {
  live_workspace.fetch_sub(buffer.bytes(), std::memory_order_relaxed);
  pool_->give(std::exchange(buffer, Buffer()));
}

template <typename T>
void CpuProgram<T>::give_all() {
  for (Buffer& buffer : activations_.tensors)
    give(buffer);
}

template <typename T>
void CpuProgram<T>::give_back_dead(size_t cursor) {
  const uint64_t live = compiled_.live_tensors(cursor);
  for (size_t i = 0; i < activations_.tensors.size(); ++i) {
    if ((live >> i & 1) == 0)
      give(activations_.tensors[i]);
  }
  is_missing_some_ = true;
}

template <typename T>
size_t CpuProgram<T>::live_bytes(size_t cursor) const {
  const uint64_t live = compiled_.live_tensors(cursor);
  size_t bytes = 0;
  for (size_t i = 0; i < activations_.tensors.size(); ++i)
    bytes += (live >> i & 1) == 0 ? 0 : tensor_bytes(static_cast<int32_t>(i));
  return bytes;
}

template <typename T>
size_t CpuProgram<T>::workspace_bytes() const {
  size_t bytes = 0;
  for (const Buffer& buffer : activations_.tensors)
    bytes += buffer.bytes();
  return bytes;
}

template <typename T>
const float* CpuProgram<T>::logits() const {
  const int32_t logits = compiled_.graph().logits();
  return has_logits_ ? activations_.tensors[static_cast<size_t>(logits)].template as<float>()
                     : nullptr;
}

template <typename T>
const Operator* CpuProgram<T>::last_of(Extent extent) const {
  const ModelGraph& graph = compiled_.graph();
  const auto [begin, end] = std::pair(graph.rows_after_layers().begin, graph.after_layers().end);
  for (int32_t i = end; i-- > begin;) {
    const Operator& op = graph.op(i);
    if (graph.output_of(op).extent == extent && op.kind != OperatorKind::kLinear)
      return &op;
  }
  return nullptr;
}

template <typename T>
std::span<const int32_t> CpuProgram<T>::sampled() const {
  const Operator* op = sampling_.empty() ? nullptr : last_of(Extent::kSequence);
  if (op == nullptr)
    return {};
  return {activations_.tensors[static_cast<size_t>(op->output)].template as<int32_t>(),
          static_cast<size_t>(batch_.num_sequences())};
}

template <typename T>
std::span<const PromptScore> CpuProgram<T>::scores() const {
  const Operator* op = last_of(Extent::kPrompt);
  if (op == nullptr)
    return {};
  return {activations_.tensors[static_cast<size_t>(op->output)].template as<PromptScore>(),
          static_cast<size_t>(batch_.rows())};
}

template <typename T>
std::span<const float> CpuProgram<T>::embeddings() const {
  const Operator* op = compiled_.graph().logits() >= 0 ? nullptr : last_of(Extent::kSequence);
  if (op == nullptr)
    return {};
  const int32_t columns = compiled_.graph().output_of(*op).columns;
  return {activations_.tensors[static_cast<size_t>(op->output)].template as<float>(),
          static_cast<size_t>(batch_.num_sequences()) * static_cast<size_t>(columns)};
}

// ---- steps

template <typename T>
void CpuProgram<T>::execute(size_t i, const ExecutionContext& context) {
  if (context.team == nullptr)
    throw std::logic_error("a program of the CPU on a device without a team");
  team_ = context.team;
  if (is_missing_some_) [[unlikely]]
    take_missing();
  for (const Step& step : compiled_.steps(i)) {
    if (static_cast<int64_t>(i) == fail_at_) [[unlikely]] {
      throw std::runtime_error(std::string("injected failure in ") +
                               compiled_.graph().op(step.first).name);
    }
    execute_step(step);
  }
}

template <typename T>
void CpuProgram<T>::execute_step(const Step& step) {
  const ModelGraph& graph = compiled_.graph();
  for (int32_t i = step.first; i <= step.last;) {
    if (const Operator& op = graph.op(i); !is_row_wise(op)) {
      if (op.kind == OperatorKind::kAttention)
        execute_attention(step, op);
      else
        execute_shared(step, op);
      ++i;
      continue;
    }
    int32_t last = i;
    while (last < step.last && is_row_wise(graph.op(last + 1)))
      ++last;
    execute_chain(step, i, last);
    i = last + 1;
  }
}

// Row-wise operators: with rows enough for all and weights that stay in the cache, each member
// takes its rows through the whole chain and no one waits in between; else all share every
// operator's columns, so that weights are read once.
template <typename T>
void CpuProgram<T>::execute_chain(const Step& step, int32_t first, int32_t last) {
  const ModelGraph& graph = compiled_.graph();
  const RowChunk chunk = row_chunk();
  const bool has_own_rows = step.rows() >= chunk.least * threads_ && step.is_whole() &&
                            !graph.is_per_sequence(graph.op(first)) &&
                            weight_bytes(first, last) <= kCachedWeightBytes &&
                            !wants_all_rows(first, last);
  if (!has_own_rows) {
    for (int32_t i = first; i <= last; ++i)
      execute_shared(step, graph.op(i));
    return;
  }
  // Equal chunks of at most so many rows, as many for each member, in whole row blocks.
  const int32_t most = chunk.most * threads_;
  const int32_t rounds = (step.rows() + most - 1) / most;
  const int32_t share = (step.rows() + rounds * threads_ - 1) / (rounds * threads_);
  const int32_t rows = (share + kRowStep - 1) / kRowStep * kRowStep;
  team_->for_each((step.rows() + rows - 1) / rows, [&](int64_t i) {
    const int32_t begin = step.row_begin + static_cast<int32_t>(i) * rows;
    const RowRange mine{begin, std::min(begin + rows, step.row_end)};
    for (int32_t op = first; op <= last; ++op)
      operators_.execute(graph.op(op), step, mine, 0, graph.parts(graph.op(op)));
  });
}

// Every chunk of rows would unpack blocks anew, or read the weights of the experts.
template <typename T>
bool CpuProgram<T>::wants_all_rows(int32_t first, int32_t last) const {
  for (int32_t i = first; i <= last; ++i) {
    const Operator& op = compiled_.graph().op(i);
    if (op.kind == OperatorKind::kExperts ||
        (op.kind == OperatorKind::kLinear && weights_->is_in_blocks(op.weight)))
      return true;
  }
  return false;
}

template <typename T>
size_t CpuProgram<T>::weight_bytes(int32_t first, int32_t last) const {
  size_t bytes = 0;
  for (int32_t i = first; i <= last; ++i) {
    const Operator& op = compiled_.graph().op(i);
    if (op.kind == OperatorKind::kLinear)
      bytes += weights_->matrix(op.weight).bytes();
  }
  return bytes;
}

template <typename T>
void CpuProgram<T>::execute_shared(const Step& step, const Operator& op) {
  if (is_light(op)) {
    const int32_t items = (step.rows() + kRowOpChunk - 1) / kRowOpChunk;
    team_->for_each(items, [&](int64_t item) {
      const int32_t begin = step.row_begin + static_cast<int32_t>(item) * kRowOpChunk;
      operators_.execute(op, step, {begin, std::min(begin + kRowOpChunk, step.row_end)}, 0, 0);
    });
    return;
  }
  if (op.kind == OperatorKind::kExperts)
    return multiply_experts(activations_, op, step, number_, *team_);
  const int32_t end = step.is_whole() ? compiled_.graph().parts(op) : step.part_end;
  const std::byte* input = is_product(op) ? prepare_input(step, op) : nullptr;
  const size_t row_bytes =
      input == nullptr ? 0 : weights_->matrix(op.weight).prepared_row_bytes(step.rows());
  const ProductShares shares(step.part_begin, end, step.rows(), threads_, is_product(op));
  team_->for_each(shares.size(), [&](int64_t i) {
    const ProductShare share = shares[i];
    operators_.execute(op, step, {step.row_begin + share.begin, step.row_begin + share.end},
                       share.first, share.last,
                       input == nullptr ? nullptr : input + row_bytes * share.begin);
  });
}

// The input of a product whose columns are shared out, prepared once for all of them. The bytes
// belong to the executor's thread and last until its next product: slices of one find them, unless
// another run came between, whose product replaced them. Then they are made again, the same bits.
template <typename T>
const std::byte* CpuProgram<T>::prepare_input(const Step& step, const Operator& op) {
  const size_t row_bytes = weights_->matrix(op.weight).prepared_row_bytes(step.rows());
  if (row_bytes == 0)
    return nullptr;
  thread_local std::vector<std::byte> input;
  thread_local PreparedInput held;
  const PreparedInput wanted{number_, &op, step.row_begin, step.row_end};
  if (held == wanted && step.part_begin > 0)
    return input.data();
  held = wanted;
  input.resize(std::max(input.size(), row_bytes * static_cast<size_t>(step.rows())));
  std::byte* prepared = input.data();
  const int32_t items = (step.rows() + kRowOpChunk - 1) / kRowOpChunk;
  team_->for_each(items, [&](int64_t item) {
    const int32_t first = static_cast<int32_t>(item) * kRowOpChunk;
    const RowRange rows{step.row_begin + first,
                        std::min(step.row_begin + first + kRowOpChunk, step.row_end)};
    operators_.prepare_input(op, step, rows, prepared + row_bytes * static_cast<size_t>(first));
  });
  return prepared;
}

template <typename T>
void CpuProgram<T>::execute_attention(const Step& step, const Operator& op) {
  const std::vector<AttentionItem> items = operators_.attention_items(op, step, threads_);
  const AttentionArgs<T> args = operators_.attention_args(op);
  attend<T>(args, items, *team_);
}

template class CpuProgram<float>;
template class CpuProgram<Bf16>;

}  // namespace flowprefill
