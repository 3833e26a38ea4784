// ModelTest: a whole CudaBackend with a TinyModel's weights under the real executor, over the
// doubles of the CUDA runtime and of the kernels.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "cuda_fixture.h"
#include "devices/cuda/backend/cuda_backend.h"
#include "devices/cuda/backend/cuda_model_program.h"
#include "host_kernels.h"
#include "tiny_model.h"

namespace flowprefill::testing {

inline constexpr int32_t kBlockTokens = 4;
inline constexpr int32_t kBlocks = 96;

// Tokens of one sequence in a batch: those in the cache already, then the new ones.
struct Part {
  int32_t sequence = 0;  // whose blocks: each sequence has 12 of its own, in no order
  std::vector<int32_t> context = {};
  std::vector<int32_t> tokens = {};
};

using Logits = std::vector<std::vector<float>>;  // [sequences][vocab]

// The first `count` of the tokens.
inline std::vector<int32_t> first(const std::vector<int32_t>& tokens, size_t count) {
  return {tokens.begin(), tokens.begin() + static_cast<ptrdiff_t>(count)};
}
inline std::vector<int32_t> between(const std::vector<int32_t>& tokens, size_t begin, size_t end) {
  return {tokens.begin() + static_cast<ptrdiff_t>(begin),
          tokens.begin() + static_cast<ptrdiff_t>(end)};
}

class ModelTest : public DoubleTest<CudaModelProgram> {
 protected:
  void SetUp() override {
    DoubleTest::SetUp();
    fake_kernels::reset();
    fake_kernels::use_bodies(false);
    options_.num_lanes = 2;
    options_.max_tokens = 64;
    options_.max_sequences = 8;
    options_.max_context = 12 * kBlockTokens;
    options_.spin_s = 0;  // see CudaTest
    options_.anchor_s = kNever;
    options_.cuts = {.row_step = 4,
                     .max_tile_rows = 16,
                     .min_tile_rows = 8,
                     .min_product_parts = 1,
                     .attention_slices = AttentionSlices::kRows,
                     .embed_rows = 1 << 30,
                     .costs = {.weight_element_bytes = 2, .embed_row_s = 1e-9}};
    // Fast products, slow attention: padding costs nothing and budgets cut attention.
    plan_options_.rates = {.gemm_flops_per_s = 1e15,
                           .attention_flops_per_s = 1e13,
                           .weight_bytes_per_s = 1e15,
                           .step_overhead_s = 1e-9};
  }

  void tear_down() override {
    DoubleTest::tear_down();
    model_.reset();
  }

  void make_model(const TinyModel& tiny) {
    model_ = std::make_unique<CudaBackend>(tiny.graph(), options_);
    tiny.load_into(*model_);
    model_->allocate_cache(kBlockTokens, kBlocks);
  }

  void start(const std::optional<PlanOptions>& warm = std::nullopt) {
    start_on(model_->make_device(warm));
  }

  static Batch batch_of(const std::vector<Part>& parts) {
    Batch batch;
    for (const Part& part : parts) {
      Sequence s{.row_begin = batch.rows(),
                 .rows = static_cast<int32_t>(part.tokens.size()),
                 .context = static_cast<int32_t>(part.context.size()),
                 .block_table = {}};
      for (int32_t i = 0; i < 12; ++i)
        s.block_table.push_back((part.sequence * 12 + i) * 29 % kBlocks);
      batch.sequences.push_back(std::move(s));
      batch.tokens.insert(batch.tokens.end(), part.tokens.begin(), part.tokens.end());
    }
    return batch;
  }

  // As the tests' options say.
  std::unique_ptr<CudaModelProgram> program_of(Batch batch, ProgramOptions options = {}) {
    options.sampling = sampling_;
    auto program = model_->make_program(std::move(batch), plan_options_, options);
    return std::unique_ptr<CudaModelProgram>(dynamic_cast<CudaModelProgram*>(program.release()));
  }

  CudaModelProgram* make(uint32_t id, const std::vector<Part>& parts,
                         const ProgramOptions& options = {}) {
    add(id, program_of(batch_of(parts), options));
    return programs_[id];
  }

  size_t num_terminal() const {
    return static_cast<size_t>(
        std::ranges::count_if(events_, [](const Event& event) { return is_terminal(event.kind); }));
  }
  bool has_ended(uint32_t id) const {
    return std::ranges::any_of(
        events_, [&](const Event& event) { return event.run_id == id && is_terminal(event.kind); });
  }

  // Dispatches it until it has ended: again each time another run, which preempted it, has ended.
  void execute_to_end(uint32_t id) {
    while (!has_ended(id)) {
      if (runs_.at(id)->state() != RunState::kRunning)
        dispatch(id);
      wait_for(num_terminal() + 1);
      if (HasFatalFailure())
        return;
    }
  }

  // Makes, executes, returns its logits.
  Logits execute(uint32_t id, const std::vector<Part>& parts) {
    make(id, parts);
    execute_to_end(id);
    return logits(id);
  }

  Logits logits(uint32_t id) const {
    EXPECT_EQ(runs_.at(id)->state(), RunState::kFinished) << runs_.at(id)->error();
    const CudaModelProgram& program = *programs_.at(id);
    Logits rows;
    for (int32_t i = 0; i < program.num_sequences(); ++i) {
      const float* row = program.logits() + i * program.logits_stride();
      rows.emplace_back(row, row + program.vocab_size());
    }
    return rows;
  }

  // A long prompt's parts: its first tokens are in the cache already.
  Part long_part(const TinyModel& tiny, int32_t sequence, uint32_t seed) const {
    const std::vector<int32_t> tokens = tiny.random_tokens(30, seed);
    return {sequence, first(tokens, 4), between(tokens, 4, 30)};
  }

  // Fills the cache with the parts' contexts.
  void fill(const std::vector<Part>& parts) {
    uint32_t id = 1000;
    for (const Part& part : parts)
      execute(++id, {{.sequence = part.sequence, .tokens = part.context}});
    events_.clear();
  }

  // A run is preempted before each of its segments in turn by another, on one lane: both give the
  // bits of undisturbed ones, and exactly what is live is spilled.
  void preempt_everywhere(const TinyModel& tiny) {
    options_.num_lanes = 1;
    const std::vector<Part> one = {long_part(tiny, 0, 1), long_part(tiny, 1, 2)};
    const std::vector<Part> two = {long_part(tiny, 2, 3), long_part(tiny, 3, 4)};
    size_t at = 0;
    uint32_t running = 0;
    before_launch_ = [&](Program& program, size_t segment) {
      if (is(program, running) && segment + 1 == at &&
          runs_.at(running + 1)->state() == RunState::kReady)
        dispatch(running + 1);
    };
    make_model(tiny);
    start();
    fill(one);
    fill(two);
    const Logits undisturbed = execute(1, one);
    const Logits of_two = execute(2, two);
    const size_t num_segments = programs_.at(1)->size();
    ASSERT_GT(num_segments, 5u);
    for (at = 1; at < num_segments; ++at) {
      running += 10;
      make(running, one);
      make(running + 1, two);
      const LaneReport before = model_->lane_report();
      execute_to_end(running);
      execute_to_end(running + 1);
      EXPECT_EQ(logits(running), undisturbed) << "preempted before segment " << at;
      EXPECT_EQ(logits(running + 1), of_two) << "preempted before segment " << at;
      EXPECT_EQ(runs_.at(running)->accounting().num_preemptions, 1u);
      const LaneReport after = model_->lane_report();
      EXPECT_EQ(after.spilled_bytes - before.spilled_bytes, programs_.at(running)->live_bytes(at));
      EXPECT_EQ(after.restored_bytes - before.restored_bytes,
                programs_.at(running)->live_bytes(at));
      EXPECT_GT(programs_.at(running)->live_bytes(at), 0u);
      EXPECT_LT(programs_.at(running)->live_bytes(at), programs_.at(running)->workspace_bytes());
    }
  }

  // Mostly they are equal to five digits. Sums in another order tip the rounding of a bf16 the
  // other way now and then; what that makes of the logits here is up to 0.02 of their spread.
  static void expect_close(const std::vector<float>& got, const std::vector<float>& want,
                           const std::string& what, double tolerance = 0.03) {
    ASSERT_EQ(got.size(), want.size());
    double spread = 0;
    double error = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      spread += want[i] * want[i];
      error = std::isnan(got[i]) ? 1e9 : std::max(error, std::abs(double{got[i]} - want[i]));
    }
    spread = std::sqrt(spread / static_cast<double>(want.size()));
    EXPECT_LT(error, tolerance * spread) << what;
  }

  CudaBackendOptions options_;
  PlanOptions plan_options_;
  std::vector<SamplingParams> sampling_;
  std::unique_ptr<CudaBackend> model_;
};

}  // namespace flowprefill::testing
