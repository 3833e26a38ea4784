#include "plain_kernels.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <numeric>
#include <span>
#include <vector>

#include "reference.h"

namespace fake_kernels {

using namespace flowprefill;  // NOLINT(google-build-using-namespace)

namespace {

double gate_of(double x, bool is_gelu) {
  return is_gelu ? reference::gelu(x) : reference::silu(x);
}

// What a code stands for: (1 + fraction) * 2^(exponent - 7), or fraction * 2^-6.
float value_of(E4m3 code) {
  const int exponent = code.bits >> 3 & 15;
  const int fraction = code.bits & 7;
  if (exponent == 15 && fraction == 7)
    return std::numeric_limits<float>::quiet_NaN();
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -9)
                                   : std::ldexp(static_cast<float>(8 + fraction), exponent - 10);
  return (code.bits & 0x80) != 0 ? -size : size;
}

// By the distance between neighbours there: an eighth of a power of two, at least 2^-9.
E4m3 nearest_e4m3(float value) {
  if (std::isnan(value))
    return {0x7f};
  int exponent = 0;
  std::frexp(value, &exponent);
  const double step = std::ldexp(1.0, std::max(exponent - 4, -9));
  const double rounded = std::min(std::nearbyint(std::abs(double{value}) / step) * step, 448.0);
  uint8_t code = 0;
  while (value_of({code}) < rounded)
    ++code;
  return {static_cast<uint8_t>(code | (std::signbit(value) ? 0x80 : 0))};
}

// One head of a row after the qkv product and its bias.
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

  const std::vector<double>& values() const { return x_; }
  void multiply(double scale, const float* weight) {
    for (size_t i = 0; i < x_.size(); ++i)
      x_[i] *= scale * weight[i];
  }
  void rotate(double scale) {
    const auto turning = static_cast<size_t>(args_.turning);
    const float* cos = args_.rotary + int64_t{row_} * args_.turning;
    std::span<double> first(x_.data(), turning);
    reference::rotate(first, cos, cos + turning / 2);
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
std::vector<Head<In>> heads_of(const RopeArgs<In>& args, int32_t row, int32_t first,
                               int32_t count) {
  std::vector<Head<In>> heads;
  for (int32_t h = 0; h < count; ++h)
    heads.emplace_back(args, row, first + h);
  return heads;
}

// Heads, normed one by one or all together, turned.
template <typename In>
std::vector<Head<In>> turned(const RopeArgs<In>& args, std::vector<Head<In>> heads,
                             const float* norm, double scale) {
  std::vector<double> all;
  for (const Head<In>& head : heads)
    all.insert(all.end(), head.values().begin(), head.values().end());
  for (size_t h = 0; h < heads.size(); ++h) {
    const auto own = args.norms_rows ? h * static_cast<size_t>(args.head_dim) : 0;
    if (norm != nullptr)
      heads[h].multiply(reference::inverse_rms(args.norms_rows ? all : heads[h].values(), args.eps),
                        norm + own);
    heads[h].rotate(scale);
  }
  return heads;
}

template <typename In>
void rope_row(const RopeArgs<In>& args, int32_t row) {
  const int32_t sequence = args.batch.sequences[row];
  Bf16* q = args.q + row * args.ld_q;
  if (sequence <= 0) {
    std::fill_n(q, args.heads * args.head_dim, Bf16{0});
    return;
  }
  const auto queries =
      turned(args, heads_of(args, row, 0, args.heads), args.q_norm, double{args.q_scale});
  for (size_t h = 0; h < queries.size(); ++h)
    queries[h].store(q + h * static_cast<size_t>(args.head_dim));
  const int32_t* table = args.batch.block_tables + (sequence - 1) * args.batch.block_table_stride;
  const int64_t offset = args.cache.offset(table, args.batch.positions[row]);
  const auto keys = turned(args, heads_of(args, row, args.heads, args.kv_heads), args.k_norm, 1.0);
  const auto values = heads_of(args, row, args.heads + args.kv_heads, args.kv_heads);
  for (int32_t h = 0; h < args.kv_heads; ++h) {
    const int64_t at = offset + h * args.cache.head_stride;
    keys[static_cast<size_t>(h)].store(args.cache.keys + at);
    values[static_cast<size_t>(h)].store(args.cache.values + at);
  }
}

// One (row, query head) of a tile over the keys it sees. Chunks are not this reference's: the first
// one stands for all keys.
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
    return args.softcap == 0 ? sum : reference::soft_capped(sum, args.softcap);
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
          is_live ? widen(args.table[args.batch.tokens[row] * args.ld_table + i]) * args.scale
                  : 0.0f;
    }
  }
}

void rotary(const RotaryArgs& args) {
  const int32_t half = args.turning / 2;
  for (int32_t row = 0; row < args.rows; ++row) {
    const bool is_live = args.batch.sequences[row] > 0;
    float* out = args.rotary + int64_t{row} * args.turning;
    for (int32_t i = 0; i < half; ++i) {
      const double angle =
          2 * std::numbers::pi * args.batch.positions[row] * args.turns_per_position[i];
      out[i] = is_live ? static_cast<float>(std::cos(angle)) * args.scale : 0.0f;
      out[half + i] = is_live ? static_cast<float>(std::sin(angle)) * args.scale : 0.0f;
    }
  }
}

template <typename Out>
void rms_norm(const RmsNormArgs<Out>& args) {
  for (int32_t to = 0; to < args.rows; ++to) {
    const int32_t row = args.rows_in == nullptr ? to : args.rows_in[to];
    Out* out = args.out + to * args.ld_out;
    if (row < 0) {
      std::fill_n(out, args.width, Out{0});
      continue;
    }
    const float* hidden = args.hidden + row * args.ld_hidden;
    const double scale =
        reference::inverse_rms(std::span(hidden, static_cast<size_t>(args.width)), args.eps);
    for (int32_t i = 0; i < args.width; ++i)
      store(static_cast<float>(hidden[i] * scale * args.weight[i]), out + i);
  }
}

void residual(const ResidualArgs& args) {
  for (int32_t row = 0; row < args.rows; ++row) {
    const float* in = args.in + row * args.ld_in;
    const double inverse =
        args.weight == nullptr
            ? 1.0
            : reference::inverse_rms(std::span(in, static_cast<size_t>(args.width)), args.eps);
    for (int32_t i = 0; i < args.width; ++i) {
      const double weight = args.weight == nullptr ? 1.0 : args.weight[i];
      float& hidden = args.hidden[row * args.ld_hidden + i];
      hidden = static_cast<float>(hidden + args.scale * inverse * in[i] * weight);
    }
  }
}

void round(const RoundArgs& args) {
  for (int32_t row = 0; row < args.rows; ++row) {
    for (int32_t i = 0; i < args.width; ++i)
      args.out[row * args.ld_out + i] = to_bf16(args.in[row * args.ld_in + i]);
  }
}

void softcap(const SoftcapArgs& args) {
  for (int32_t row = 0; row < args.rows; ++row) {
    for (int32_t i = 0; i < args.width; ++i) {
      float& value = args.values[row * args.ld_values + i];
      value = static_cast<float>(reference::soft_capped(value, args.cap));
    }
  }
}

template <typename In>
void rope(const RopeArgs<In>& args) {
  for (int32_t row = 0; row < args.rows; ++row)
    rope_row(args, row);
}

template <typename In>
void gate(const GateArgs<In>& args) {
  for (int32_t row = 0; row < args.rows; ++row) {
    for (int32_t i = 0; i < args.width; ++i) {
      const In* pair = args.in + row * args.ld_in + 2 * i;
      args.out[row * args.ld_out + i] =
          to_bf16(static_cast<float>(gate_of(widen(pair[0]), args.is_gelu) * widen(pair[1])));
    }
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

void score(const ScoreArgs& args) {
  const auto width = static_cast<size_t>(args.width);
  for (int32_t row = 0; row < args.rows; ++row) {
    const int32_t sequence = args.batch.sequences[row];
    if (sequence <= 0)
      continue;
    const float* logits = args.logits + row * args.ld_logits;
    PromptScore& out = args.out[row];
    std::vector<int32_t> ids(width);
    std::iota(ids.begin(), ids.end(), 0);
    std::ranges::stable_sort(ids, [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
    for (size_t i = 0; i < PromptScore::kTop; ++i) {
      out.top_ids[i] = i < width ? ids[i] : -1;
      out.top_logits[i] = i < width ? logits[ids[i]] : -std::numeric_limits<float>::infinity();
    }
    double sum = 0;
    for (size_t i = 0; i < width; ++i)
      sum += std::exp(double{logits[i]} - out.top_logits[0]);
    out.log_sum_exp = static_cast<float>(out.top_logits[0] + std::log(sum));
    const bool is_last = row + 1 == args.batch_rows || args.batch.sequences[row + 1] != sequence;
    const int32_t target = is_last ? args.next_tokens[sequence - 1] : args.batch.tokens[row + 1];
    out.target_logit = target < 0 ? std::numeric_limits<float>::quiet_NaN() : logits[target];
    out.rank = target < 0 ? 0
                          : 1 + static_cast<int32_t>(std::count_if(
                                    logits, logits + width,
                                    [&](float logit) { return logit > out.target_logit; }));
  }
}

void pool(const PoolArgs& args) {
  for (int32_t row = 0; row < args.rows && args.batch.sequences[row] > 0; ++row) {
    const int32_t sequence = args.batch.sequences[row] - 1;
    const int32_t before = sequence == 0 ? -1 : args.last_rows[sequence - 1];
    const auto rows = static_cast<float>(args.last_rows[sequence] - before);
    for (int32_t i = 0; i < args.width; ++i) {
      float& mean = args.out[sequence * args.ld_out + i];
      const float sum = args.row_begin + row == before + 1 ? 0.0f : mean;
      mean = sum + args.in[row * args.ld_in + i] * (1.0f / rows);
    }
  }
}

void attention(const AttentionArgs& args) {
  for (int32_t i = 0; i < args.num_tiles; ++i) {
    const AttentionTile& tile = args.tiles[i];
    if (tile.sequence <= 0 || tile.chunk > 0)
      continue;
    const int32_t end = std::min(tile.entry + kAttentionEntries, tile.entries);
    for (int32_t entry = tile.entry; entry < end; ++entry) {
      for (int32_t head = args.kv_begin; head < args.kv_end; ++head)
        attend(args, tile, entry, head);
    }
  }
}

void attention_of_rows(const AttentionArgs& args) {
  const int32_t group = args.heads / args.kv_heads;
  for (int32_t i = 0; i < args.num_tiles; ++i) {
    const AttentionTile& tile = args.tiles[i];
    if (tile.sequence <= 0 || tile.chunk > 0)
      continue;
    const int32_t end = std::min(tile.entry + attention_rows_of_tile(args.head_dim), tile.entries);
    for (int32_t entry = tile.entry * group; entry < end * group; ++entry) {
      for (int32_t head = args.kv_begin; head < args.kv_end; ++head)
        attend(args, tile, entry, head);
    }
  }
}

void quantise(const QuantiseArgs& args) {
  for (int32_t row = 0; row < args.rows; ++row) {
    const Bf16* in = args.in + row * args.ld_in;
    float most = 0x1p-100f;
    for (int32_t i = 0; i < args.width; ++i)
      most = std::fmax(most, std::abs(widen(in[i])));
    args.scales[row] = most / 448.0f;
    for (int32_t i = 0; i < args.width; ++i)
      args.out[row * args.ld_out + i] = nearest_e4m3(widen(in[i]) * (1.0f / args.scales[row]));
  }
}

void widen_codes(const WidenArgs& args) {
  for (int32_t row = 0; row < args.rows; ++row) {
    for (int32_t i = 0; i < args.width; ++i)
      args.out[row * args.ld_out + i] = to_bf16(value_of(args.in[row * args.ld_in + i]));
  }
}

void rescale(const RescaleArgs& args) {
  const auto at = [&](const float* values, int32_t index, float without) {
    return values == nullptr ? without : values[index];
  };
  const auto sum = [&](int32_t row, int32_t column) {
    return args.in[row * args.ld_in + column] *
               (args.scale * at(args.row_scales, row, 1) * at(args.column_scales, column, 1)) +
           at(args.bias, column, 0);
  };
  for (int32_t row = 0; row < args.rows; ++row) {
    for (int32_t i = 0; i < args.width(); ++i) {
      const int64_t to = row * args.ld_out + i;
      const float value =
          args.is_gated
              ? static_cast<float>(gate_of(sum(row, 2 * i), args.is_gelu) * sum(row, 2 * i + 1))
              : sum(row, i);
      if (args.output == GemmOutput::kFloat) {
        float& out = static_cast<float*>(args.out)[to];
        out = value + (args.adds_to_out ? out : 0);
      } else {
        Bf16& out = static_cast<Bf16*>(args.out)[to];
        out = to_bf16(value + (args.adds_to_out ? widen(out) : 0));
      }
    }
  }
}

void gemm(const GemmArgs& args) {
  const auto element = [&args](const Bf16* wide, const E4m3* codes, int64_t at) {
    return args.is_fp8() ? widen(codes[at]) : widen(wide[at]);
  };
  std::vector<float> a(static_cast<size_t>(args.depth));
  std::vector<float> products(static_cast<size_t>(args.columns));
  for (int32_t row = args.row_begin; row < args.row_end; ++row) {
    for (int32_t k = 0; k < args.depth; ++k)
      a[static_cast<size_t>(k)] = element(args.a, args.fp8.a, row * args.lda + k);
    for (int32_t column = 0; column < args.columns; ++column) {
      float sum = 0;
      for (int32_t k = 0; k < args.depth; ++k)
        sum += a[static_cast<size_t>(k)] * element(args.b, args.fp8.b, column * args.ldb + k);
      if (args.is_fp8() && args.fp8.a_scales != nullptr)
        sum *= args.fp8.a_scales[row] * args.fp8.b_scales[column];
      products[static_cast<size_t>(column)] =
          sum * args.scale + (args.bias == nullptr ? 0 : args.bias[column]);
    }
    for (int32_t column = 0; column < args.d_columns(); ++column) {
      const auto at = static_cast<size_t>(column);
      const float value =
          args.is_gated
              ? static_cast<float>(gate_of(products[2 * at], args.is_gelu) * products[2 * at + 1])
              : products[at];
      if (args.output == GemmOutput::kBf16) {
        Bf16& d = static_cast<Bf16*>(args.d)[row * args.ldd + column];
        d = to_bf16(value + (args.adds_to_d ? widen(d) : 0.0f));
      } else {
        float& d = static_cast<float*>(args.d)[row * args.ldd + column];
        d = value + (args.adds_to_d ? d : 0.0f);
      }
    }
  }
}

template void rms_norm<float>(const RmsNormArgs<float>&);
template void rms_norm<Bf16>(const RmsNormArgs<Bf16>&);
template void rope<float>(const RopeArgs<float>&);
template void rope<Bf16>(const RopeArgs<Bf16>&);
template void gate<float>(const GateArgs<float>&);
template void gate<Bf16>(const GateArgs<Bf16>&);

void fused(const FusedProduct& args) {
  GemmArgs product = args.product;
  RopeArgs<Bf16> rope = args.rope;
  const auto rows = static_cast<size_t>(product.row_end);
  std::vector<Bf16> normed(rows * static_cast<size_t>(product.depth));
  std::vector<Bf16> qkv(rows * static_cast<size_t>(product.columns));
  if (args.has_norm()) {
    rms_norm<Bf16>({.hidden = args.norm.hidden,
                    .ld_hidden = args.norm.ld_hidden,
                    .weight = args.norm.weight,
                    .out = normed.data(),
                    .ld_out = product.depth,
                    .rows = product.row_end,
                    .width = product.depth,
                    .eps = args.norm.eps});
    product.a = normed.data();
    product.lda = product.depth;
  }
  if (args.has_rope()) {
    product.d = qkv.data();
    product.ldd = product.columns;
    rope.qkv = qkv.data() + int64_t{product.row_begin} * product.columns;
    rope.ld_qkv = product.columns;
  }
  gemm(product);
  if (args.has_rope())
    fake_kernels::rope(rope);
}

}  // namespace fake_kernels
