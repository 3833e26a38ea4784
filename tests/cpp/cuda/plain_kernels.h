// The kernels of csrc/devices/cuda/kernels as plain loops: the same results to the rounding,
// written apart from the bodies. Called by host_kernels.cc.
#pragma once

#include "devices/cuda/kernels/attention_args.h"
#include "devices/cuda/kernels/fp8_args.h"
#include "devices/cuda/kernels/fused_product.h"
#include "devices/cuda/kernels/gemm_args.h"
#include "devices/cuda/kernels/row_args.h"
#include "devices/cuda/kernels/sample_args.h"
#include "devices/cuda/kernels/score_args.h"

namespace fake_kernels {

void embed(const flowprefill::EmbedArgs& args);
void rotary(const flowprefill::RotaryArgs& args);
template <typename Out>
void rms_norm(const flowprefill::RmsNormArgs<Out>& args);
void residual(const flowprefill::ResidualArgs& args);
void round(const flowprefill::RoundArgs& args);
void softcap(const flowprefill::SoftcapArgs& args);
template <typename In>
void rope(const flowprefill::RopeArgs<In>& args);
template <typename In>
void gate(const flowprefill::GateArgs<In>& args);
void sample(const flowprefill::SampleArgs& args);
void score(const flowprefill::ScoreArgs& args);
void pool(const flowprefill::PoolArgs& args);
void attention(const flowprefill::AttentionArgs& args);
void attention_of_rows(const flowprefill::AttentionArgs& args);  // of attention_row_tiles()
void quantise(const flowprefill::QuantiseArgs& args);
void widen_codes(const flowprefill::WidenArgs& args);
void rescale(const flowprefill::RescaleArgs& args);
void gemm(const flowprefill::GemmArgs& args);
// rms_norm(), gemm() and rope(), with what lies between them in memory of its own.
void fused(const flowprefill::FusedProduct& args);

}  // namespace fake_kernels
