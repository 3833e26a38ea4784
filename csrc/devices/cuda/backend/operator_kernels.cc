// Long because each kind of operator has its launch here, some lines each.
#include "devices/cuda/backend/operator_kernels.h"

#include <algorithm>
#include <cstring>
#include <numbers>

#include "devices/cuda/backend/operator_fusion.h"
#include "devices/cuda/kernels/kernels.h"
#include "devices/cuda/runtime/cuda_error.h"

namespace flowprefill {
namespace {

// Scores are powers of two: the softmax takes exp2.
constexpr double kLog2E = std::numbers::log2e;

// Row `row` of the batch, or of its sequences, of a tensor in the lane.
template <typename T>
T* row_at(const PlanShape& shape, const Step& step, std::byte* lane, int32_t tensor, int32_t row) {
  const int64_t index = is_of_tile(shape.graph.tensor(tensor).extent) ? row - step.base : row;
  return reinterpret_cast<T*>(lane + shape.lane.offset(tensor)) + index * shape.lane.stride(tensor);
}

// Whether a list of tiles is known to be padding, which comes last; a graph's is not.
bool is_padding(const LaunchArgs& args, size_t tiles) {
  AttentionTile first{};
  first.sequence = 1;
  if (!args.host_inputs.empty())
    std::memcpy(&first, args.host_inputs.data() + tiles, sizeof first);
  return first.sequence == 0;
}

}  // namespace

// One operator of one step of one run: where its rows are.
struct OperatorKernels::Call {
  const PlanShape& shape;
  const Operator& op;
  const Step& step;
  const LaunchArgs& args;
  CallContext context = {};

  const AttentionShape& attention() const { return shape.graph.attention; }
  int32_t columns() const { return shape.graph.output_of(op).columns; }
  int32_t stride(int32_t tensor) const { return shape.lane.stride(tensor); }
  template <typename T>
  T* row(int32_t tensor, int32_t index) const {
    return row_at<T>(shape, step, args.activations, tensor, index);
  }
  // The step's first row.
  template <typename T>
  T* first(int32_t tensor) const {
    return row<T>(tensor, step.row_begin);
  }
  template <typename T>
  const T* input(size_t offset) const {
    return reinterpret_cast<const T*>(args.inputs + offset);
  }
  // The rows that sequences end with, from the step's first sequence.
  const int32_t* last_rows() const {
    return input<int32_t>(shape.inputs.last_rows) + step.row_begin;
  }

  // Of the step's rows.
  BatchView batch() const {
    const InputLayout& in = shape.inputs;
    return {.tokens = input<int32_t>(in.tokens) + step.row_begin,
            .sequences = input<int32_t>(in.sequences) + step.row_begin,
            .positions = input<int32_t>(in.positions) + step.row_begin,
            .block_tables = input<int32_t>(in.block_tables),
            .block_table_stride = in.table_stride};
  }
};

void OperatorKernels::launch(const PlanShape& shape, const Step& step,
                             const LaunchArgs& args) const {
  for (int32_t i = step.first; i <= step.last; ++i) {
    const Operator& op = shape.graph.op(i);
    const CallContext context{.op = op.name, .layer = op.layer};
    if (const auto fused = fused_from(shape, step, args, i)) {
      FP_CUDA(launch_fused(fused->args, args.stream), context);
      i = fused->last;
      continue;
    }
    launch({.shape = shape, .op = op, .step = step, .args = args, .context = context});
  }
}

void OperatorKernels::prepare(const PlanShape& shape, const Step& step) const {
  for (int32_t i = step.first; i <= step.last; ++i) {
    if (shape.graph.op(i).kind != OperatorKind::kLinear)
      continue;
    const GemmArgs args = product(shape, weights_, shape.graph.op(i), step, nowhere());
    gemms_.prepare({&args, 1});
  }
}

size_t OperatorKernels::num_kernels(const PlanShape& shape, const Step& step) const {
  const LaunchArgs unused{.activations = nowhere(), .inputs = nowhere(), .scratch = nowhere()};
  size_t count = 0;
  for (int32_t i = step.first; i <= step.last; ++i) {
    if (const auto fused = fused_from(shape, step, unused, i)) {
      count += 1;
      i = fused->last;
    } else {
      count += num_kernels(shape, shape.graph.op(i), step);
    }
  }
  return count;
}

// Only in place of the kernel of few rows, whose bits it has.
std::optional<OperatorKernels::Fused> OperatorKernels::fused_from(const PlanShape& shape,
                                                                  const Step& step,
                                                                  const LaunchArgs& args,
                                                                  int32_t index) const {
  if (step.rows() > kMostFewRows)
    return std::nullopt;
  const auto found = operators_to_fuse(shape.graph, step, index);
  if (!found.has_value())
    return std::nullopt;
  const Operator& op = shape.graph.op(found->product);
  Fused fused{.args = {product(shape, weights_, op, step, args.activations)},
              .last = found->product};
  const GemmArgs& of_op = fused.args.product;
  if (op.softcap != 0.0f || !can_fuse(of_op) ||
      !gemms_.chooses(of_op, gemm_tile_name(GemmTile::kFewRows)))
    return std::nullopt;
  if (found->norm >= 0) {
    if (!can_fuse_norm(of_op))
      return std::nullopt;  // the product comes after it, and may be fused with its rope
    const Operator& norm = shape.graph.op(found->norm);
    fused.args.norm = normed_rows({.shape = shape, .op = norm, .step = step, .args = args});
  }
  if (found->rope >= 0) {
    const Operator& rope = shape.graph.op(found->rope);
    const RopeArgs<Bf16> turned =
        rope_args({.shape = shape, .op = rope, .step = step, .args = args});
    if (can_fuse_rope(of_op, turned)) {
      fused.args.rope = turned;
      fused.last = found->rope;
    }
  }
  if (!fused.args.has_norm() && !fused.args.has_rope())
    return std::nullopt;
  return fused;
}

size_t OperatorKernels::num_kernels(const PlanShape& shape, const Operator& op,
                                    const Step& step) const {
  if (op.kind == OperatorKind::kLinear) {
    const int32_t of_product = gemms_.num_kernels(product(shape, weights_, op, step, nowhere()));
    return static_cast<size_t>(of_product) + (op.softcap == 0.0f ? 0 : 1);
  }
  if (op.kind != OperatorKind::kAttention)
    return 1;
  return shape.inputs.attention[shape.attention_index(step, op)].num_kernels();
}

void OperatorKernels::launch(const Call& call) const {
  switch (call.op.kind) {
    case OperatorKind::kEmbed:
      return embed(call);
    case OperatorKind::kRotary:
      return rotary(call);
    case OperatorKind::kNorm:
      return norm(call);
    case OperatorKind::kLinear:
      return linear(call);
    case OperatorKind::kRope:
      return rope(call);
    case OperatorKind::kAttention:
      return attention(call);
    case OperatorKind::kSample:
      return sample(call);
    case OperatorKind::kResidual:
      return residual(call);
    case OperatorKind::kRound:
      return round(call);
    case OperatorKind::kScore:
      return score(call);
    case OperatorKind::kPool:
      return pool(call);
    case OperatorKind::kRoute:
    case OperatorKind::kExperts:  // refused at load
      return;
  }
}

void OperatorKernels::embed(const Call& call) const {
  FP_CUDA(launch_embed({.batch = call.batch(),
                        .table = weights_.matrix(call.op.weight),
                        .ld_table = call.columns(),
                        .hidden = call.first<float>(call.op.output),
                        .ld_hidden = call.stride(call.op.output),
                        .rows = call.step.rows(),
                        .width = call.columns(),
                        .scale = static_cast<float>(call.op.scale)},
                       call.args.stream),
          call.context);
}

void OperatorKernels::rotary(const Call& call) const {
  const auto table = static_cast<size_t>(call.op.table);
  FP_CUDA(launch_rotary({.batch = call.batch(),
                         .turns_per_position = weights_.turns_per_position(call.op.table),
                         .scale = static_cast<float>(call.shape.graph.rotary_tables[table].scale),
                         .rotary = call.first<float>(call.op.output),
                         .rows = call.step.rows(),
                         .turning = call.columns()},
                        call.args.stream),
          call.context);
}

void OperatorKernels::norm(const Call& call) const {
  if (call.shape.graph.output_of(call.op).type == ElementType::kFloat)
    return norm_into<float>(call);
  norm_into<Bf16>(call);
}

template <typename Out>
void OperatorKernels::norm_into(const Call& call) const {
  const Operator& op = call.op;
  const bool is_gather = call.shape.graph.is_gather(op);
  const RmsNormArgs<Out> args{
      .hidden = call.row<float>(op.input, is_gather ? 0 : call.step.row_begin),
      .ld_hidden = call.stride(op.input),
      .weight = weights_.vector(op.weight),
      .rows_in = is_gather ? call.last_rows() : nullptr,
      .out = call.first<Out>(op.output),
      .ld_out = call.stride(op.output),
      .rows = call.step.rows(),
      .width = call.columns(),
      .eps = op.eps};
  FP_CUDA(launch_rms_norm(args, call.args.stream), call.context);
}

NormedRows OperatorKernels::normed_rows(const Call& call) const {
  return {.hidden = call.first<float>(call.op.input),
          .ld_hidden = call.stride(call.op.input),
          .weight = weights_.vector(call.op.weight),
          .eps = call.op.eps};
}

void OperatorKernels::residual(const Call& call) const {
  const Operator& op = call.op;
  FP_CUDA(launch_residual({.in = call.first<float>(op.input),
                           .ld_in = call.stride(op.input),
                           .weight = weights_.vector(op.weight),
                           .hidden = call.first<float>(op.output),
                           .ld_hidden = call.stride(op.output),
                           .rows = call.step.rows(),
                           .width = call.columns(),
                           .scale = static_cast<float>(op.scale),
                           .eps = op.eps},
                          call.args.stream),
          call.context);
}

void OperatorKernels::round(const Call& call) const {
  const Operator& op = call.op;
  FP_CUDA(launch_round({.in = call.first<float>(op.input),
                        .ld_in = call.stride(op.input),
                        .out = call.first<Bf16>(op.output),
                        .ld_out = call.stride(op.output),
                        .rows = call.step.rows(),
                        .width = call.columns()},
                       call.args.stream),
          call.context);
}

GemmArgs OperatorKernels::product(const PlanShape& shape, const DeviceWeights& weights,
                                  const Operator& op, const Step& step, std::byte* lane) {
  const Weight& weight = shape.graph.weights.weight(op.weight);
  const auto rows = static_cast<int32_t>(padded_to_8(weight.rows()));
  const int32_t begin = step.part_begin * kPartColumns;
  const int32_t end = step.is_whole() ? rows : std::min(step.part_end * kPartColumns, rows);
  const int32_t column = step.part_begin * shape.graph.part_columns(op);
  const bool is_float = shape.graph.output_of(op).type == ElementType::kFloat;
  const auto output = [&]() -> void* {
    if (is_float)
      return row_at<float>(shape, step, lane, op.output, step.row_begin) + column;
    return row_at<Bf16>(shape, step, lane, op.output, step.row_begin) + column;
  };
  const float* bias = weights.vector(op.bias);
  const PlanSizes& sizes = shape.sizes();
  const Extent extent = shape.graph.output_of(op).extent;
  const int32_t operator_rows = extent == Extent::kSequence   ? sizes.sequences
                                : extent == Extent::kHeadTile ? sizes.head_tile_rows
                                                              : sizes.rows;
  const bool is_fp8 = weights.is_fp8(op.weight);
  Fp8Operands fp8;
  if (is_fp8) {
    fp8.b = weights.codes(op.weight) + begin * weight.columns;
    fp8.b_scales = weights.scales(op.weight) + begin;
  }
  return {.a = row_at<Bf16>(shape, step, lane, op.input, step.row_begin),
          .lda = shape.lane.stride(op.input),
          .b = is_fp8 ? nullptr : weights.matrix(op.weight) + begin * weight.columns,
          .fp8 = fp8,
          .ldb = weight.columns,
          .bias = bias == nullptr ? nullptr : bias + begin,
          .d = output(),
          .ldd = shape.lane.stride(op.output),
          .output = is_float ? GemmOutput::kFloat : GemmOutput::kBf16,
          .adds_to_d = op.epilogue == Epilogue::kAdd,
          .is_gated = op.epilogue == Epilogue::kGate,
          .is_gelu = op.activation == Activation::kGeluTanh,
          .scale = static_cast<float>(op.scale),
          .row_begin = 0,
          .row_end = step.rows(),
          .columns = end - begin,
          .depth = static_cast<int32_t>(weight.columns),
          .operator_rows = operator_rows,
          .operator_columns = rows};
}

void OperatorKernels::linear(const Call& call) const {
  const GemmArgs args = product(call.shape, weights_, call.op, call.step, call.args.activations);
  gemms_.launch(args, {call.args.scratch, scratch_bytes_}, call.args.stream, call.context);
  if (call.op.softcap == 0.0f)
    return;
  FP_CUDA(launch_softcap({.values = args.first_d<float>(),
                          .ld_values = args.ldd,
                          .rows = args.rows(),
                          .width = args.d_columns(),
                          .cap = call.op.softcap},
                         call.args.stream),
          call.context);
}

void OperatorKernels::rope(const Call& call) const {
  FP_CUDA(launch_rope(rope_args(call), call.args.stream), call.context);
}

RopeArgs<Bf16> OperatorKernels::rope_args(const Call& call) const {
  const Operator& op = call.op;
  const int32_t head_dim = call.attention().head_dim;
  const bool norms_rows =
      op.q_norm >= 0 && call.shape.graph.weights.weight(op.q_norm).rows() != head_dim;
  return {.batch = call.batch(),
          .qkv = call.first<Bf16>(op.input),
          .ld_qkv = call.stride(op.input),
          .bias = weights_.vector(op.bias),
          .q_norm = weights_.vector(op.q_norm),
          .k_norm = weights_.vector(op.k_norm),
          .rotary = call.first<float>(op.rotary),
          .q = call.first<Bf16>(op.output),
          .ld_q = call.stride(op.output),
          .cache = cache_.layer(op.layer),
          .q_scale = static_cast<float>(kLog2E * op.scale),
          .eps = op.eps,
          .rows = call.step.rows(),
          .heads = call.attention().heads,
          .kv_heads = call.attention().kv_heads,
          .head_dim = head_dim,
          .turning = call.shape.graph.tensor(op.rotary).columns,
          .norms_rows = norms_rows};
}

// Tiles count their rows from the step's base.
AttentionArgs OperatorKernels::attention_args(const Call& call) const {
  const Operator& op = call.op;
  const InputLayout& in = call.shape.inputs;
  const int32_t kv_heads = call.attention().kv_heads;
  return {.q = call.row<Bf16>(op.input, call.step.base),
          .ld_q = call.stride(op.input),
          .out = call.row<Bf16>(op.output, call.step.base),
          .ld_out = call.stride(op.output),
          .cache = cache_.layer(op.layer),
          .block_tables = call.input<int32_t>(in.block_tables),
          .block_table_stride = in.table_stride,
          .rows = call.step.row_end - call.step.base,
          .partials = reinterpret_cast<float*>(call.args.scratch),
          .heads = call.attention().heads,
          .kv_heads = kv_heads,
          .kv_begin = call.step.part_begin,
          .kv_end = call.step.is_whole() ? kv_heads : call.step.part_end,
          .head_dim = call.attention().head_dim,
          .window = op.window,
          .softcap = static_cast<float>(kLog2E * op.softcap)};
}

// Where keys may be split, enough blocks for a tile each of those that are not, and to fill the
// multiprocessors with those that are. Where long prompts have Hopper's kernel the list is mostly
// padding: no more than fill the multiprocessors, since blocks that find nothing take time too.
void OperatorKernels::attention(const Call& call) const {
  const AttentionLaunches& launches =
      call.shape.inputs.attention[call.shape.attention_index(call.step, call.op)];
  AttentionArgs args = attention_args(call);
  const auto takes = [&](const AttentionLists& lists) {
    args.tiles = call.input<AttentionTile>(lists.tiles);
    args.num_tiles = lists.num_tiles;
    args.merges = call.input<AttentionTile>(lists.merges);
    args.num_merges = lists.num_merges;
    return !is_padding(call.args, lists.tiles);
  };
  args.partial_rows = launches.row_partial_rows;
  for (const AttentionLists& lists : launches.row_lists) {
    if (!takes(lists))
      continue;
    if (args.num_merges > 0 && is_padding(call.args, lists.merges))
      args.num_merges = 0;
    FP_CUDA(launch_attention_hopper(args, call.args.stream), call.context);
  }
  const int32_t heads = args.kv_end - args.kv_begin;
  const int32_t units = call.shape.rules.split.multiprocessors * AttentionSplit::kBlocksPerUnit;
  args.partial_rows = launches.partial_rows;
  for (const AttentionLists& lists : launches.lists) {
    const int32_t whole = call.shape.rules.uses_hopper ? 0 : lists.num_whole;
    args.num_blocks = std::min(lists.num_tiles, std::max(whole, (units + heads - 1) / heads));
    if (takes(lists))
      FP_CUDA(launch_attention(args, call.args.stream), call.context);
  }
}

void OperatorKernels::sample(const Call& call) const {
  const Operator& op = call.op;
  const auto* sampling = call.input<SamplingParams>(call.shape.inputs.sampling);
  FP_CUDA(launch_sample({.logits = call.first<float>(op.input),
                         .ld_logits = call.stride(op.input),
                         .params = sampling + call.step.row_begin,
                         .rows_in = call.last_rows(),
                         .out = call.first<int32_t>(op.output),
                         .rows = call.step.rows(),
                         .width = call.shape.graph.vocab_size},
                        call.args.stream),
          call.context);
}

void OperatorKernels::score(const Call& call) const {
  const Operator& op = call.op;
  FP_CUDA(launch_score({.batch = call.batch(),
                        .next_tokens = call.input<int32_t>(call.shape.inputs.next_tokens),
                        .logits = call.first<float>(op.input),
                        .ld_logits = call.stride(op.input),
                        .out = reinterpret_cast<PromptScore*>(call.first<float>(op.output)),
                        .rows = call.step.rows(),
                        .batch_rows = call.shape.sizes().rows - call.step.row_begin,
                        .width = call.shape.graph.vocab_size},
                       call.args.stream),
          call.context);
}

void OperatorKernels::pool(const Call& call) const {
  const Operator& op = call.op;
  FP_CUDA(launch_pool({.batch = call.batch(),
                       .last_rows = call.input<int32_t>(call.shape.inputs.last_rows),
                       .in = call.first<float>(op.input),
                       .ld_in = call.stride(op.input),
                       .out = call.row<float>(op.output, 0),
                       .ld_out = call.stride(op.output),
                       .row_begin = call.step.row_begin,
                       .rows = call.step.rows(),
                       .width = call.columns()},
                      call.args.stream),
          call.context);
}

}  // namespace flowprefill
