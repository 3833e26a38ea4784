// Bodies of the FP8 kernels: rows to e4m3, e4m3 to bf16, scales and epilogue of a product. Called
// by fp8_kernels.cu on the device and by tests/cpp/kernels on the host.
//
// Every body handles block_x() = one row; block_y() = a part of its columns where it says so.
#pragma once

#include "devices/cuda/kernels/fp8_args.h"
#include "devices/cuda/kernels/row_bodies.h"

namespace flowprefill {

// Largest of the threads' values, in every thread. `scratch`: shared, one float per warp.
template <class Thread>
FP_HD float block_max(const Thread& t, float value, float* scratch) {
  for (int mask = 16; mask > 0; mask /= 2) {
    const float other = t.shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  if (t.lane() == 0)
    scratch[t.warp()] = value;
  t.sync();
  for (int32_t warp = 0; warp < t.count() / 32; ++warp)
    value = scratch[warp] > value ? scratch[warp] : value;
  return value;
}

// NaN is no maximum: it goes into the codes as it is. `shared` memory: a float per warp.
template <class Thread>
FP_HD void quantise_body(const Thread& t, const QuantiseArgs& args) {
  using Halves = Vec<Bf16, kColumnsPerThread>;
  const int32_t step = t.count() * kColumnsPerThread;
  const Bf16* in = args.in + t.block_x() * args.ld_in;
  E4m3* out = args.out + t.block_x() * args.ld_out;
  float most = 0.0f;
  for (int32_t i = t.index() * kColumnsPerThread; i < args.width; i += step) {
    const auto x = *reinterpret_cast<const Halves*>(in + i);
    FP_UNROLL for (int k = 0; k < kColumnsPerThread; ++k) {
      const float size = absolute(widen(x.v[k]));
      most = size > most ? size : most;
    }
  }
  const float scale = e4m3_scale(block_max(t, most, t.template shared<float>()));
  const float inverse = 1.0f / scale;
  if (t.index() == 0)
    args.scales[t.block_x()] = scale;
  for (int32_t i = t.index() * kColumnsPerThread; i < args.width; i += step) {
    const auto x = *reinterpret_cast<const Halves*>(in + i);
    Vec<E4m3, kColumnsPerThread> y;
    FP_UNROLL for (int k = 0; k < kColumnsPerThread; ++k) y.v[k] = to_e4m3(widen(x.v[k]) * inverse);
    *reinterpret_cast<Vec<E4m3, kColumnsPerThread>*>(out + i) = y;
  }
}

// block_y(): columns.
template <class Thread>
FP_HD void widen_body(const Thread& t, const WidenArgs& args) {
  const int32_t column = first_column(t);
  if (column >= args.width)
    return;
  const E4m3* in = args.in + t.block_x() * args.ld_in + column;
  const auto x = *reinterpret_cast<const Vec<E4m3, kColumnsPerThread>*>(in);
  Vec<Bf16, kColumnsPerThread> y;
  FP_UNROLL for (int k = 0; k < kColumnsPerThread; ++k) y.v[k] = to_bf16(widen(x.v[k]));
  auto* out = args.out + t.block_x() * args.ld_out + column;
  *reinterpret_cast<Vec<Bf16, kColumnsPerThread>*>(out) = y;
}

// Four of a row's sums from `column` on, with scales and bias.
FP_HD Vec<float, 4> rescaled(const RescaleArgs& args, int32_t row, float row_scale,
                             int32_t column) {
  using Float4 = Vec<float, 4>;
  auto x = *reinterpret_cast<const Float4*>(args.in + row * args.ld_in + column);
  Float4 scales = {{1.0f, 1.0f, 1.0f, 1.0f}};
  Float4 bias = {};
  if (args.column_scales != nullptr)
    scales = *reinterpret_cast<const Float4*>(args.column_scales + column);
  if (args.bias != nullptr)
    bias = *reinterpret_cast<const Float4*>(args.bias + column);
  FP_UNROLL for (int k = 0; k < 4; ++k) x.v[k] = x.v[k] * (row_scale * scales.v[k]) + bias.v[k];
  return x;
}

// block_y(): columns of out.
template <class Thread>
FP_HD void rescale_body(const Thread& t, const RescaleArgs& args) {
  using Float4 = Vec<float, 4>;
  const int32_t column = first_column(t);
  if (column >= args.width())
    return;
  const int32_t row = t.block_x();
  const float row_scale = args.scale * (args.row_scales == nullptr ? 1.0f : args.row_scales[row]);
  float y[kColumnsPerThread];
  FP_UNROLL for (int i = 0; i < kColumnsPerThread; i += 4) {
    if (args.is_gated) {  // the same for the whole launch
      FP_UNROLL for (int half = 0; half < 2; ++half) {
        const int32_t from = 2 * (column + i) + 4 * half;
        const Float4 pairs = rescaled(args, row, row_scale, from);
        y[i + 2 * half] = gated(args.is_gelu, pairs.v[0], pairs.v[1]);
        y[i + 2 * half + 1] = gated(args.is_gelu, pairs.v[2], pairs.v[3]);
      }
    } else {
      const Float4 x = rescaled(args, row, row_scale, column + i);
      FP_UNROLL for (int k = 0; k < 4; ++k) y[i + k] = x.v[k];
    }
  }
  const int64_t at = row * args.ld_out + column;
  if (args.output == GemmOutput::kFloat) {
    auto* out = reinterpret_cast<Float4*>(static_cast<float*>(args.out) + at);
    FP_UNROLL for (int k = 0; k < kColumnsPerThread; ++k) {
      float& to = out[k / 4].v[k % 4];
      to = y[k] + (args.adds_to_out ? to : 0.0f);
    }
  } else {
    auto* out = reinterpret_cast<Vec<Bf16, kColumnsPerThread>*>(static_cast<Bf16*>(args.out) + at);
    FP_UNROLL for (int k = 0; k < kColumnsPerThread; ++k) out->v[k] =
        to_bf16(y[k] + (args.adds_to_out ? widen(out->v[k]) : 0.0f));
  }
}

}  // namespace flowprefill
