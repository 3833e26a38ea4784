#include "plain_kernels.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <span>
#include <vector>

#include "reference.h"

namespace fake_kernels {

using namespace flowprefill;  // NOLINT(google-build-using-namespace)

namespace {

// One head of a row after the qkv product, as floats.
template <typename In>
class Head {
 public:
  Head(const RopeArgs<In>& args, int32_t row, int32_t head) : args_(args), row_(row) {
    for (int32_t i = 0; i < args.head_dim; ++i) {
      const int64_t column = int64_t{head} * args.head_dim + i;
      const float bias = args.bias == nullptr ? 0.0f : args.bias[column];
      x_.push_back(widen(args.qkv[row * args.ld_qkv + column]) + bias);
    }
  }

  void norm(const float* weight) {
    if (weight == nullptr)
      return;
    const double scale = reference::inverse_rms(x_, args_.eps);
    for (size_t i = 0; i < x_.size(); ++i)
      x_[i] *= scale * weight[i];
  }
  void rotate(double scale) {
    const float* cos = args_.rotary + int64_t{row_} * args_.head_dim;
    reference::rotate(x_, cos, cos + args_.head_dim / 2);
    for (double& value : x_)
      value *= scale;
  }
  void store(Bf16* out) const {
    for (size_t i = 0; i < x_.size(); ++i)
      out[i] = to_bf16(static_cast<float>(x_[i]));
  }

 private:
  const RopeArgs<In>& args_;
  const int32_t row_;
  std::vector<double> x_;
};

template <typename In>
void rope_row(const RopeArgs<In>& args, int32_t row) {
  const int32_t sequence = args.batch.sequences[row];
  for (int32_t h = 0; h < args.heads; ++h) {
    Bf16* q = args.q + row * args.ld_q + int64_t{h} * args.head_dim;
    if (sequence <= 0) {
      std::fill_n(q, args.head_dim, Bf16{0});
      continue;
    }
    Head<In> head(args, row, h);
    head.norm(args.q_norm);
    head.rotate(args.q_scale);
    head.store(q);
  }
  if (sequence <= 0)
    return;
  const int32_t* table = args.batch.block_tables + (sequence - 1) * args.batch.block_table_stride;
  const int64_t offset = args.cache.offset(table, args.batch.positions[row]);
  for (int32_t h = 0; h < args.kv_heads; ++h) {
    Head<In> key(args, row, args.heads + h);
    key.norm(args.k_norm);
    key.rotate(1.0);
    key.store(args.cache.keys + offset + h * args.cache.head_stride);
    Head<In>(args, row, args.heads + args.kv_heads + h)
        .store(args.cache.values + offset + h * args.cache.head_stride);
  }
}

// One (row, query head) of a tile over the keys it sees.
void attend(const AttentionArgs& args, const AttentionTile& tile, int32_t entry, int32_t kv_head) {
  const int32_t group = args.heads / args.kv_heads;
  const int32_t row = tile.row + entry / group;
  const int32_t position = tile.position + entry / group;
  const int64_t column = int64_t{kv_head * group + entry % group} * args.head_dim;
  const Bf16* q = args.q + row * args.ld_q + column;
  const int32_t* table = args.block_tables + (tile.sequence - 1) * args.block_table_stride;
  const int32_t first = args.window > 0 ? std::max(0, position - args.window + 1) : 0;
  const auto at = [&](const Bf16* cache, int32_t key) {
    return cache + args.cache.offset(table, key) + kv_head * args.cache.head_stride;
  };
  const auto score = [&](int32_t key) {
    double sum = 0;
    for (int32_t i = 0; i < args.head_dim; ++i)
      sum += widen(q[i]) * widen(at(args.cache.keys, key)[i]);
    return sum;
  };
  const auto value = [&](int32_t key, size_t i) { return widen(at(args.cache.values, key)[i]); };
  const auto dim = static_cast<size_t>(args.head_dim);
  Bf16* out = args.out + row * args.ld_out + column;
  for (const double x : reference::attended(first, position + 1, dim, score, value))
    *out++ = to_bf16(static_cast<float>(x));
}

}  // namespace

void embed(const EmbedArgs& args) {
  for (int32_t row = 0; row < args.rows; ++row) {
    const bool is_live = args.batch.sequences[row] > 0;
    for (int32_t i = 0; i < args.width; ++i) {
      args.hidden[row * args.ld_hidden + i] =
          is_live ? widen(args.table[args.batch.tokens[row] * args.ld_table + i]) : 0.0f;
    }
  }
}

void rotary(const RotaryArgs& args) {
  const int32_t half = args.head_dim / 2;
  for (int32_t row = 0; row < args.rows; ++row) {
    const bool is_live = args.batch.sequences[row] > 0;
    float* out = args.rotary + int64_t{row} * args.head_dim;
    for (int32_t i = 0; i < half; ++i) {
      const double angle =
          2 * std::numbers::pi * args.batch.positions[row] * args.turns_per_position[i];
      out[i] = is_live ? static_cast<float>(std::cos(angle)) * args.scale : 0.0f;
      out[half + i] = is_live ? static_cast<float>(std::sin(angle)) * args.scale : 0.0f;
    }
  }
}

void rms_norm(const RmsNormArgs& args) {
  for (int32_t to = 0; to < args.rows; ++to) {
    const int32_t row = args.rows_in == nullptr ? to : args.rows_in[to];
    Bf16* out = args.out + to * args.ld_out;
    if (row < 0) {
      std::fill_n(out, args.width, Bf16{0});
      continue;
    }
    float* hidden = args.hidden + row * args.ld_hidden;
    for (int32_t i = 0; args.delta != nullptr && i < args.width; ++i)
      hidden[i] += args.delta[row * args.ld_delta + i];
    const double scale =
        reference::inverse_rms(std::span(hidden, static_cast<size_t>(args.width)), args.eps);
    for (int32_t i = 0; i < args.width; ++i)
      out[i] = to_bf16(static_cast<float>(hidden[i] * scale * args.weight[i]));
  }
}

template <typename In>
void rope(const RopeArgs<In>& args) {
  for (int32_t row = 0; row < args.rows; ++row)
    rope_row(args, row);
}

template <typename In>
void swiglu(const SwigluArgs<In>& args) {
  for (int32_t row = 0; row < args.rows; ++row) {
    for (int32_t i = 0; i < args.width; ++i) {
      const In* pair = args.in + row * args.ld_in + 2 * i;
      args.out[row * args.ld_out + i] =
          to_bf16(static_cast<float>(reference::silu(widen(pair[0])) * widen(pair[1])));
    }
  }
}

void argmax(const ArgmaxArgs& args) {
  for (int32_t row = 0; row < args.rows; ++row) {
    const float* values = args.values + row * args.ld_values;
    args.out[row] = static_cast<int32_t>(std::max_element(values, values + args.width) - values);
  }
}

void sample(const SampleArgs& args) {
  for (int32_t row = 0; row < args.rows; ++row) {
    args.out[row] = kNoToken;
    const float* logits = args.logits + row * args.ld_logits;
    const auto is_bad = [](float value) {
      return !(value < std::numeric_limits<float>::infinity());
    };
    if ((args.rows_in != nullptr && args.rows_in[row] < 0) ||
        std::any_of(logits, logits + args.width, is_bad))
      continue;
    const float* top = std::max_element(logits, logits + args.width);
    if (*top == -std::numeric_limits<float>::infinity())
      continue;
    const SamplingParams& params = args.params[row];
    args.out[row] = static_cast<int32_t>(top - logits);
    if (params.temperature < 1e-5f)
      continue;
    args.out[row] = reference::sampled({logits, static_cast<size_t>(args.width)}, params,
                                       params.top_p, params.uniform);
  }
}

void attention(const AttentionArgs& args) {
  const int32_t group = args.heads / args.kv_heads;
  for (int32_t i = 0; i < args.num_tiles; ++i) {
    const AttentionTile& tile = args.tiles[i];
    if (tile.sequence <= 0)
      continue;
    const int32_t end = std::min(tile.entry + kAttentionEntries, tile.entries);
    for (int32_t entry = tile.entry; entry < end; ++entry) {
      for (int32_t head = 0; head < args.heads / group; ++head)
        attend(args, tile, entry, head);
    }
  }
}

void gemm(const GemmArgs& args) {
  std::vector<float> a(static_cast<size_t>(args.depth));
  std::vector<float> products(static_cast<size_t>(args.columns));
  for (int32_t row = args.row_begin; row < args.row_end; ++row) {
    for (int32_t k = 0; k < args.depth; ++k)
      a[static_cast<size_t>(k)] = widen(args.a[row * args.lda + k]);
    for (int32_t column = 0; column < args.columns; ++column) {
      const Bf16* b = args.b + column * args.ldb;
      float sum = 0;
      for (int32_t k = 0; k < args.depth; ++k)
        sum += a[static_cast<size_t>(k)] * widen(b[k]);
      products[static_cast<size_t>(column)] = sum + (args.bias == nullptr ? 0 : args.bias[column]);
    }
    for (int32_t column = 0; column < args.d_columns(); ++column) {
      const auto at = static_cast<size_t>(column);
      const float value =
          args.is_gated
              ? static_cast<float>(reference::silu(products[2 * at]) * products[2 * at + 1])
              : products[at];
      if (args.output == GemmOutput::kBf16) {
        static_cast<Bf16*>(args.d)[row * args.ldd + column] = to_bf16(value);
      } else {
        float& d = static_cast<float*>(args.d)[row * args.ldd + column];
        d = value + (args.adds_to_d ? d : 0.0f);
      }
    }
  }
}

template void rope<float>(const RopeArgs<float>&);
template void rope<Bf16>(const RopeArgs<Bf16>&);
template void swiglu<float>(const SwigluArgs<float>&);
template void swiglu<Bf16>(const SwigluArgs<Bf16>&);

}  // namespace fake_kernels
