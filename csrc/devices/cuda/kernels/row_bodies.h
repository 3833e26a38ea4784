// Bodies of the row kernels: embedding, rotary table, RMS norm, residual, rounding, cap of logits,
// gate. Called by row_kernels.cu on the device and by tests/cpp/kernels on the host. The arithmetic
// is that of the CPU's row kernels (csrc/devices/cpu/row_kernels.h): float inside, rounded once
// when stored.
//
// Every body handles block_x() = one row; block_y() = a part of its columns where it says so.
#pragma once

#include "devices/cuda/kernels/row_args.h"
#include "devices/cuda/kernels/thread.h"

namespace flowprefill {

constexpr int32_t kColumnsPerThread = 8;  // 16 bytes of bf16

// First of the columns this thread handles; block_y() counts blocks of count() threads.
template <class Thread>
FP_HD int32_t first_column(const Thread& t) {
  return (t.block_y() * t.count() + t.index()) * kColumnsPerThread;
}

// hidden[row] = scale * table[token]; zeros in padding. block_y(): columns.
template <class Thread>
FP_HD void embed_body(const Thread& t, const EmbedArgs& args) {
  const int32_t row = t.block_x();
  const int32_t column = first_column(t);
  if (column >= args.width)
    return;
  Vec<float, 4> out[2] = {};
  if (args.batch.sequences[row] > 0) {
    const int64_t from = args.batch.tokens[row] * args.ld_table + column;
    const auto in = *reinterpret_cast<const Vec<Bf16, 8>*>(args.table + from);
    FP_UNROLL for (int i = 0; i < 8; ++i) out[i / 4].v[i % 4] = widen(in.v[i]) * args.scale;
  }
  auto* to = reinterpret_cast<Vec<float, 4>*>(args.hidden + row * args.ld_hidden + column);
  to[0] = out[0];
  to[1] = out[1];
}

// cos and sin of 2 pi * turns; |turns| up to 1e9 keeps full float precision.
FP_HD void cos_sin_of_turns(double turns, float* cos, float* sin) {
#if FP_ON_DEVICE
  const double whole = rint(turns);
  sincospif(static_cast<float>(2.0 * (turns - whole)), sin, cos);
#else
  const double angle = 6.283185307179586476925 * (turns - std::rint(turns));
  *cos = static_cast<float>(std::cos(angle));
  *sin = static_cast<float>(std::sin(angle));
#endif
}

// rotary[row] = cos | sin of the row's position, one thread per pair; zeros in padding.
template <class Thread>
FP_HD void rotary_body(const Thread& t, const RotaryArgs& args) {
  const int32_t row = t.block_x();
  const int32_t half = args.turning / 2;
  const bool is_live = args.batch.sequences[row] > 0;
  float* out = args.rotary + static_cast<int64_t>(row) * args.turning;
  for (int32_t i = t.index(); i < half; i += t.count()) {
    float cos = 0.0f;
    float sin = 0.0f;
    if (is_live)
      cos_sin_of_turns(args.batch.positions[row] * args.turns_per_position[i], &cos, &sin);
    out[i] = cos * args.scale;
    out[half + i] = sin * args.scale;
  }
}

FP_HD float inverse_rms(float squares, int32_t n, float eps) {
#if FP_ON_DEVICE
  return 1.0f / sqrtf(squares / static_cast<float>(n) + eps);
#else
  return 1.0f / std::sqrt(squares / static_cast<float>(n) + eps);
#endif
}

// Sum of the squares of a row's elements, over the block and the same bits in every thread. This
// thread's begin at `first`, after those that are in `sum`. `scratch`: shared, a float per warp.
template <class Thread>
FP_HD float sum_of_squares(const Thread& t, const float* row, int32_t first, int32_t width,
                           float* scratch, float sum = 0.0f) {
  for (int32_t i = first; i < width; i += t.count() * 4) {
    const auto x = *reinterpret_cast<const Vec<float, 4>*>(row + i);
    FP_UNROLL for (int k = 0; k < 4; ++k) sum = fused_multiply_add(x.v[k], x.v[k], sum);
  }
  return block_sum(t, sum, scratch);
}

// Lines of the weights to the L2 cache: no kernel writes them, so this may run while the kernel
// before still does.
template <typename Out, class Thread>
FP_HD void bring_norm_weights(const Thread& t, const RmsNormArgs<Out>& args) {
  constexpr int32_t kLine = 128 / sizeof(float);
  for (int32_t i = t.index() * kLine; i < args.width; i += t.count() * kLine)
    t.prefetch(args.weight + i);
}

// Of a row, four elements each, that a thread of NormOfRow keeps in registers; wider rows are read
// twice beyond these.
constexpr int kNormKept = 4;

template <typename Out>
FP_HD void store_normed(const Vec<float, 4>& x, const Vec<float, 4>& weight, float scale,
                        Out* out) {
  Vec<Out, 4> y;
  FP_UNROLL for (int k = 0; k < 4; ++k) store(x.v[k] * scale * weight.v[k], &y.v[k]);
  *reinterpret_cast<Vec<Out, 4>*>(out) = y;
}

// out = hidden / rms(hidden) * weight, of one row by the whole block: all threads ask for what they
// read by load(), then come to finish(). What an element's bits depend on besides the row: the
// number of threads.
template <class Thread>
class NormOfRow {
 public:
  FP_HD NormOfRow(const Thread& t, const float* hidden, const float* weight, int32_t width)
      : t_(t),
        hidden_(hidden),
        weight_(weight),
        width_(width),
        first_(t.index() * 4),
        step_(t.count() * 4) {}

  FP_HD void load() {
    FP_UNROLL for (int n = 0; n < kNormKept; ++n) {
      kept_[n] = {};
      if (first_ + n * step_ >= width_)
        continue;
      kept_[n] = *reinterpret_cast<const Float4*>(hidden_ + first_ + n * step_);
      weights_[n] = *reinterpret_cast<const Float4*>(weight_ + first_ + n * step_);
    }
  }

  // `scratch`: shared, a float per warp.
  template <typename Out>
  FP_HD void finish(float eps, float* scratch, Out* out) const {
    float sum = 0.0f;
    FP_UNROLL for (int n = 0; n < kNormKept; ++n) {
      FP_UNROLL for (int k = 0; k < 4; ++k) sum =
          fused_multiply_add(kept_[n].v[k], kept_[n].v[k], sum);
    }
    const int32_t rest = first_ + kNormKept * step_;
    sum = sum_of_squares(t_, hidden_, rest, width_, scratch, sum);
    const float scale = inverse_rms(sum, width_, eps);
    FP_UNROLL for (int n = 0; n < kNormKept; ++n) {
      if (first_ + n * step_ < width_)
        store_normed(kept_[n], weights_[n], scale, out + first_ + n * step_);
    }
    for (int32_t i = rest; i < width_; i += step_) {
      store_normed(*reinterpret_cast<const Float4*>(hidden_ + i),
                   *reinterpret_cast<const Float4*>(weight_ + i), scale, out + i);
    }
  }

 private:
  using Float4 = Vec<float, 4>;

  const Thread& t_;
  const float* const hidden_;
  const float* const weight_;
  const int32_t width_;
  const int32_t first_;
  const int32_t step_;
  Float4 kept_[kNormKept];
  Float4 weights_[kNormKept];
};

// NormOfRow of row block_x(). With `rows_in` block i norms row rows_in[i] into row i of out; a
// negative entry is padding and gives zeros.
template <typename Out, class Thread>
FP_HD void rms_norm_body(const Thread& t, const RmsNormArgs<Out>& args) {
  const int32_t to = t.block_x();
  const int32_t row = args.rows_in == nullptr ? to : args.rows_in[to];
  Out* out = args.out + to * args.ld_out;
  if (row >= 0) {  // the same for the whole block
    NormOfRow<Thread> norm(t, args.hidden + row * args.ld_hidden, args.weight, args.width);
    norm.load();
    return norm.finish(args.eps, t.template shared<float>(), out);
  }
  for (int32_t i = t.index() * 4; i < args.width; i += t.count() * 4)
    *reinterpret_cast<Vec<Out, 4>*>(out + i) = {};
}

// hidden[row] += scale * in[row], or scale * in / rms(in) * weight where there is a weight.
template <class Thread>
FP_HD void residual_body(const Thread& t, const ResidualArgs& args) {
  using Float4 = Vec<float, 4>;
  const float* in = args.in + t.block_x() * args.ld_in;
  float* hidden = args.hidden + t.block_x() * args.ld_hidden;
  float scale = args.scale;
  if (args.weight != nullptr)  // the same for the whole launch
    scale *=
        inverse_rms(sum_of_squares(t, in, 4 * t.index(), args.width, t.template shared<float>()),
                    args.width, args.eps);
  for (int32_t i = t.index() * 4; i < args.width; i += t.count() * 4) {
    const auto x = *reinterpret_cast<const Float4*>(in + i);
    auto sum = *reinterpret_cast<const Float4*>(hidden + i);
    Float4 w = {{1.0f, 1.0f, 1.0f, 1.0f}};
    if (args.weight != nullptr)
      w = *reinterpret_cast<const Float4*>(args.weight + i);
    FP_UNROLL for (int k = 0; k < 4; ++k) sum.v[k] += scale * x.v[k] * w.v[k];
    *reinterpret_cast<Float4*>(hidden + i) = sum;
  }
}

// out = in, rounded. block_y(): columns.
template <class Thread>
FP_HD void round_body(const Thread& t, const RoundArgs& args) {
  const int32_t column = first_column(t);
  if (column >= args.width)
    return;
  const float* in = args.in + t.block_x() * args.ld_in + column;
  Vec<Bf16, kColumnsPerThread> out;
  FP_UNROLL for (int i = 0; i < kColumnsPerThread; i += 4) {
    const auto x = *reinterpret_cast<const Vec<float, 4>*>(in + i);
    FP_UNROLL for (int k = 0; k < 4; ++k) out.v[i + k] = to_bf16(x.v[k]);
  }
  auto* to = args.out + t.block_x() * args.ld_out + column;
  *reinterpret_cast<Vec<Bf16, kColumnsPerThread>*>(to) = out;
}

// values = cap * tanh(values / cap). block_y(): columns, four to a thread.
template <class Thread>
FP_HD void softcap_body(const Thread& t, const SoftcapArgs& args) {
  const int32_t column = (t.block_y() * t.count() + t.index()) * 4;
  if (column >= args.width)
    return;
  float* at = args.values + t.block_x() * args.ld_values + column;
  auto x = *reinterpret_cast<const Vec<float, 4>*>(at);
  FP_UNROLL for (int k = 0; k < 4; ++k) x.v[k] = soft_cap(x.v[k], args.cap, 1.0f / args.cap);
  *reinterpret_cast<Vec<float, 4>*>(at) = x;
}

// silu(gate) * up, or gelu(gate) * up with GELU by tanh: both are gate * up / (1 + 2^e).
FP_HD float gated(bool is_gelu, float gate, float up) {
  constexpr float kLog2E = 1.44269504088896340736f;
  constexpr float kLinear = -2.0f * kLog2E * 0.797884560802865f;  // sqrt(2 / pi)
  constexpr float kCubic = kLinear * 0.044715f;
  const float slope = is_gelu ? kLinear + kCubic * (gate * gate) : -kLog2E;
  return gate * up / (1.0f + exp2_of(gate * slope));
}

// out = activation(gate) * up; gate and up alternate in in[row]. block_y(): columns of out.
template <typename In, class Thread>
FP_HD void gate_body(const Thread& t, const GateArgs<In>& args) {
  const int32_t column = first_column(t);
  if (column >= args.width)
    return;
  constexpr int kWidth = 16 / sizeof(In);
  const In* in = args.in + t.block_x() * args.ld_in + 2 * column;
  Vec<Bf16, kColumnsPerThread> out;
  FP_UNROLL for (int from = 0; from < 2 * kColumnsPerThread; from += kWidth) {
    const auto pairs = *reinterpret_cast<const Vec<In, kWidth>*>(in + from);
    FP_UNROLL for (int i = 0; i < kWidth; i += 2) out.v[(from + i) / 2] =
        to_bf16(gated(args.is_gelu, widen(pairs.v[i]), widen(pairs.v[i + 1])));
  }
  auto* to = args.out + t.block_x() * args.ld_out + column;
  *reinterpret_cast<Vec<Bf16, kColumnsPerThread>*>(to) = out;
}

}  // namespace flowprefill
