#include "devices/cuda/backend/layer_kernels.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "devices/cuda/kernels/kernels.h"
#include "devices/cuda/runtime/cuda_error.h"

namespace flowprefill {
namespace {

// What is asked by shape alone never reads or writes there.
std::byte* nowhere() {
  return reinterpret_cast<std::byte*>(uintptr_t{1} << 30);
}

bool is_product(Op op) {
  return op == Op::kQkv || op == Op::kOutput || op == Op::kGateUp || op == Op::kDown ||
         op == Op::kHead;
}

}  // namespace

// One step of one run: where its rows are.
struct LayerKernels::Call {
  const PlanShape& shape;
  const Step& step;
  const LaunchArgs& args;
  CallContext context = {};

  int32_t rows() const { return step.row_end - step.row_begin; }

  // Row `row` of a buffer of the lane.
  template <typename T>
  T* lane(size_t offset, int64_t row, int64_t width) const {
    return reinterpret_cast<T*>(args.activations + offset) + row * width;
  }
  template <typename T>
  T* batch_row(size_t offset, int64_t width) const {
    return lane<T>(offset, step.row_begin, width);
  }
  template <typename T>
  T* tile_row(size_t offset, int64_t width) const {
    return lane<T>(offset, step.row_begin - step.base, width);
  }
  template <typename T>
  const T* input(size_t offset) const {
    return reinterpret_cast<const T*>(args.inputs + offset);
  }

  // Of the step's rows.
  BatchView batch() const {
    const InputLayout& in = shape.inputs;
    return {.tokens = input<int32_t>(in.tokens) + step.row_begin,
            .sequences = input<int32_t>(in.sequences) + step.row_begin,
            .positions = input<int32_t>(in.positions) + step.row_begin,
            .block_tables = input<int32_t>(in.block_tables),
            .block_table_stride = shape.sizes.table_stride};
  }
};

LayerKernels::LayerKernels(const ModelConfig& config, const DeviceWeights& weights,
                           const DeviceKvCache& cache, const GemmSelector& gemms,
                           size_t scratch_bytes)
    : c_(config), weights_(weights), cache_(cache), gemms_(gemms), scratch_bytes_(scratch_bytes) {}

size_t LayerKernels::num_kernels(const ModelConfig& config, const Step& step) {
  const size_t operators = static_cast<size_t>(step.last) - static_cast<size_t>(step.first) + 1;
  const size_t with_rotary = step.first == Op::kEmbed ? 1 : 0;
  return operators + with_rotary + (chooses_tokens(config, step) ? 1 : 0);
}

void LayerKernels::launch(const PlanShape& shape, const Step& step, const LaunchArgs& args) const {
  const bool is_in_layer = step.first > Op::kEmbed && step.first < Op::kFinalNorm;
  Call call{.shape = shape, .step = step, .args = args};
  for (auto op = static_cast<uint8_t>(step.first); op <= static_cast<uint8_t>(step.last); ++op) {
    call.context = {.op = op_name(static_cast<Op>(op)), .layer = is_in_layer ? step.layer : -1};
    launch(call, static_cast<Op>(op));
  }
  if (chooses_tokens(c_, step))
    choose_tokens(call);
}

void LayerKernels::prepare(const PlanShape& shape, const Step& step) const {
  for (auto op = static_cast<uint8_t>(step.first); op <= static_cast<uint8_t>(step.last); ++op) {
    if (!is_product(static_cast<Op>(op)))
      continue;
    const GemmArgs args = product(shape, weights_, static_cast<Op>(op), step, nowhere());
    gemms_.prepare({&args, 1});
  }
}

void LayerKernels::launch(const Call& call, Op op) const {
  switch (op) {
    case Op::kEmbed:
      return embed(call);
    case Op::kAttnNorm:
      return norm(call, weights_.layer(call.step.layer).attn_norm);
    case Op::kMlpNorm:
      return norm(call, weights_.layer(call.step.layer).mlp_norm);
    case Op::kRope:
      return rope(call);
    case Op::kAttention:
      return attention(call);
    case Op::kFinalNorm:
      return final_norm(call);
    case Op::kQkv:
    case Op::kOutput:
    case Op::kGateUp:
    case Op::kDown:
    case Op::kHead:
      return multiply(call, op);
  }
}

void LayerKernels::embed(const Call& call) const {
  const LaneLayout& lane = call.shape.lane;
  FP_CUDA(launch_embed({.batch = call.batch(),
                        .table = weights_.embed(),
                        .ld_table = c_.hidden_size,
                        .hidden = call.batch_row<float>(lane.hidden, c_.hidden_size),
                        .ld_hidden = c_.hidden_size,
                        .rows = call.rows(),
                        .width = c_.hidden_size},
                       call.args.stream),
          call.context);
  FP_CUDA(launch_rotary({.batch = call.batch(),
                         .turns_per_position = weights_.turns_per_position(),
                         .scale = static_cast<float>(c_.rope_attention_scale),
                         .rotary = call.batch_row<float>(lane.rotary, c_.head_dim),
                         .rows = call.rows(),
                         .head_dim = c_.head_dim},
                        call.args.stream),
          call.context);
}

void LayerKernels::norm(const Call& call, const float* weight) const {
  const LaneLayout& lane = call.shape.lane;
  FP_CUDA(launch_rms_norm({.hidden = call.batch_row<float>(lane.hidden, c_.hidden_size),
                           .ld_hidden = c_.hidden_size,
                           .weight = weight,
                           .out = call.tile_row<Bf16>(lane.normed, c_.hidden_size),
                           .ld_out = c_.hidden_size,
                           .rows = call.rows(),
                           .width = c_.hidden_size,
                           .eps = c_.rms_eps},
                          call.args.stream),
          call.context);
}

void LayerKernels::rope(const Call& call) const {
  const LaneLayout& lane = call.shape.lane;
  const DeviceLayer& w = weights_.layer(call.step.layer);
  const double scale = std::numbers::log2e / std::sqrt(static_cast<double>(c_.head_dim));
  const RopeArgs<Bf16> args{.batch = call.batch(),
                            .qkv = call.tile_row<Bf16>(lane.qkv, c_.qkv_columns()),
                            .ld_qkv = c_.qkv_columns(),
                            .bias = w.qkv_bias,
                            .q_norm = w.q_norm,
                            .k_norm = w.k_norm,
                            .rotary = call.batch_row<float>(lane.rotary, c_.head_dim),
                            .q = call.tile_row<Bf16>(lane.q, c_.q_columns()),
                            .ld_q = c_.q_columns(),
                            .cache = cache_.layer(call.step.layer),
                            .q_scale = static_cast<float>(scale),
                            .eps = c_.rms_eps,
                            .rows = call.rows(),
                            .heads = c_.num_heads,
                            .kv_heads = c_.num_kv_heads,
                            .head_dim = c_.head_dim};
  FP_CUDA(launch_rope(args, call.args.stream), call.context);
}

void LayerKernels::attention(const Call& call) const {
  const LaneLayout& lane = call.shape.lane;
  const InputLayout& in = call.shape.inputs;
  const size_t slice = call.shape.attention_index(call.step);
  // Tiles count their rows from the start of the tile buffers.
  FP_CUDA(launch_attention({.q = call.lane<Bf16>(lane.q, 0, 0),
                            .ld_q = c_.q_columns(),
                            .out = call.lane<Bf16>(lane.context, 0, 0),
                            .ld_out = c_.q_columns(),
                            .cache = cache_.layer(call.step.layer),
                            .block_tables = call.input<int32_t>(in.block_tables),
                            .block_table_stride = call.shape.sizes.table_stride,
                            .tiles = call.input<AttentionTile>(in.tiles[slice]),
                            .num_tiles = in.num_tiles[slice],
                            .heads = c_.num_heads,
                            .kv_heads = c_.num_kv_heads,
                            .head_dim = c_.head_dim,
                            .window = c_.windows[static_cast<size_t>(call.step.layer)]},
                           call.args.stream),
          call.context);
}

GemmArgs LayerKernels::product(const PlanShape& shape, const DeviceWeights& weights, Op op,
                               const Step& step, std::byte* lane) {
  const ModelConfig& c = shape.config;
  const LaneLayout& at = shape.lane;
  const int64_t row = step.row_begin - step.base;  // of the tile buffers
  const auto bf16 = [&](size_t offset, int64_t from, int64_t width) {
    return reinterpret_cast<Bf16*>(lane + offset) + from * width;
  };
  const auto f32 = [&](size_t offset, int64_t from, int64_t width) {
    return reinterpret_cast<float*>(lane + offset) + from * width;
  };
  GemmArgs args{.row_begin = 0, .row_end = step.row_end - step.row_begin};
  const auto set = [&args](const Bf16* a, const Bf16* b, int32_t depth, void* d, int32_t columns) {
    args.a = a;
    args.lda = depth;
    args.b = b;
    args.ldb = depth;
    args.depth = depth;
    args.d = d;
    args.ldd = columns;
    args.columns = columns;
  };
  const DeviceLayer& w = weights.layer(op == Op::kHead ? 0 : step.layer);
  switch (op) {
    case Op::kQkv:
      set(bf16(at.normed, row, c.hidden_size), w.qkv, c.hidden_size,
          bf16(at.qkv, row, c.qkv_columns()), c.qkv_columns());
      args.output = GemmOutput::kBf16;  // rope adds the bias: it does so before the first rounding
      break;
    case Op::kOutput:
      set(bf16(at.context, row, c.q_columns()), w.o, c.q_columns(),
          f32(at.hidden, step.row_begin, c.hidden_size), c.hidden_size);
      args.bias = w.o_bias;
      args.adds_to_d = true;
      break;
    case Op::kGateUp:
      set(bf16(at.normed, row, c.hidden_size), w.gate_up, c.hidden_size,
          bf16(at.gated, row, c.intermediate_size), 2 * c.intermediate_size);
      args.ldd = c.intermediate_size;
      args.bias = w.gate_up_bias;
      args.output = GemmOutput::kBf16;
      args.is_gated = true;
      break;
    case Op::kDown:
      set(bf16(at.gated, row, c.intermediate_size), w.down, c.intermediate_size,
          f32(at.hidden, step.row_begin, c.hidden_size), c.hidden_size);
      args.bias = w.down_bias;
      args.adds_to_d = true;
      break;
    default: {  // kHead: its rows are sequences, the step's are blocks of the vocabulary
      const auto [begin, end] = head_column_range(shape.padded_vocab, step);
      set(bf16(at.last, 0, 0), weights.head() + int64_t{begin} * c.hidden_size, c.hidden_size,
          f32(at.logits, 0, 0) + begin, end - begin);
      args.ldd = shape.padded_vocab;
      args.row_end = shape.sizes.sequences;
    }
  }
  return args;
}

void LayerKernels::multiply(const Call& call, Op op) const {
  gemms_.launch(product(call.shape, weights_, op, call.step, call.args.activations),
                {call.args.scratch, scratch_bytes_}, call.args.stream, call.context);
}

void LayerKernels::final_norm(const Call& call) const {
  const LaneLayout& lane = call.shape.lane;
  FP_CUDA(launch_rms_norm({.hidden = call.lane<float>(lane.hidden, 0, 0),
                           .ld_hidden = c_.hidden_size,
                           .weight = weights_.final_norm(),
                           .rows_in = call.input<int32_t>(call.shape.inputs.last_rows),
                           .out = call.lane<Bf16>(lane.last, 0, 0),
                           .ld_out = c_.hidden_size,
                           .rows = call.shape.sizes.sequences,
                           .width = c_.hidden_size,
                           .eps = c_.rms_eps},
                          call.args.stream),
          call.context);
}

void LayerKernels::choose_tokens(const Call& call) const {
  const LaneLayout& lane = call.shape.lane;
  const InputLayout& in = call.shape.inputs;
  FP_CUDA(launch_sample({.logits = call.lane<float>(lane.logits, 0, 0),
                         .ld_logits = call.shape.padded_vocab,
                         .params = call.input<SamplingParams>(in.sampling),
                         .rows_in = call.input<int32_t>(in.last_rows),
                         .out = call.lane<int32_t>(lane.tokens, 0, 0),
                         .rows = call.shape.sizes.sequences,
                         .width = c_.vocab_size},
                        call.args.stream),
          call.context);
}

}  // namespace flowprefill
