// Every CUDA call of real programs made to fail, one after another: one failed run, all others
// right to the bit, nothing left behind.
#include <gtest/gtest.h>

#include "model_fixture.h"

namespace flowprefill::testing {
namespace {

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr size_t kEvery = 7;  // each run is some ten times slower
#else
constexpr size_t kEvery = 1;
#endif

// Not one that a GEMM kernel may refuse a product with: another kernel would take it.
constexpr cudaError_t kFault = cudaErrorIllegalState;

class ModelFaultTest : public ModelTest {
 protected:
  struct Outcome {
    size_t num_failed = 0;
    size_t num_calls = 0;
    size_t num_faults = 0;
    std::string call = {};  // that was made to fail
    std::string errors = {};
  };

  void SetUp() override {
    ModelTest::SetUp();
    options_.num_lanes = 1;
    options_.buckets = {8};
    plan_options_.granularity = Granularity::kLayer;
    before_ = [this](Program& program, size_t segment) {
      if (is(program, 2) && segment == 1 && runs_.at(3)->state() == RunState::kReady)
        dispatch(3);
    };
  }

  Part part_of(uint32_t id) const {
    return {.sequence = static_cast<int32_t>(id), .tokens = tiny_.random_tokens(5, id % 2)};
  }

  // Run 1 is eager; 2 captures, is preempted and spilled by 3, and comes back; 4 replays. Then run
  // 5 must finish.
  Outcome execute_all(const std::function<void()>& inject) {
    before_launch_ = before_;
    make_model(tiny_);
    start();
    for (uint32_t id = 1; id <= 5; ++id)
      make(id, {part_of(id)});
    const size_t calls_before = fake_cudart::num_calls();
    inject();
    for (uint32_t id = 1; id <= 4; ++id)
      execute_to_end(id);
    Outcome outcome{.num_calls = fake_cudart::num_calls() - calls_before,
                    .num_faults = fake_cudart::num_faults(),
                    .call = fake_cudart::last_fault()};
    num_failed_captures_ = model_->graph_report().num_failed;
    execute_to_end(5);
    EXPECT_EQ(runs_.at(5)->state(), RunState::kFinished) << "the executor is dead";
    for (uint32_t id = 1; id <= 5; ++id) {
      if (runs_.at(id)->state() == RunState::kFailed) {
        ++outcome.num_failed;
        outcome.errors += runs_.at(id)->error();
      } else {
        expect_same(id);
      }
    }
    EXPECT_EQ(num_terminal(), 5u);
    tear_down();
    EXPECT_EQ(fake_cudart::live().handles(), 0) << fake_cudart::live().text();
    return outcome;
  }

  // The same bits as the first run with these tokens ever gave.
  void expect_same(uint32_t id) {
    const auto got = logits(id);
    const auto known = known_.emplace(id % 2, got);
    EXPECT_EQ(got, known.first->second) << "run " << id;
  }

  const TinyModel tiny_{Kind::kLlama, 2};
  HookedDevice::Hook before_;
  std::map<uint32_t, std::vector<std::vector<float>>> known_;
  uint64_t num_failed_captures_ = 0;
};

TEST_F(ModelFaultTest, fault_at_every_call_ends_as_one_failed_run_or_as_an_eager_segment) {
  const Outcome without = execute_all([] {});
  ASSERT_EQ(without.num_failed, 0u) << without.errors;
  expect_close(known_.at(1)[0], tiny_.logits(part_of(1).tokens), "run 1");
  ASSERT_GT(without.num_calls, 100u);
  size_t num_hit = 0;
  size_t num_fallbacks = 0;
  for (size_t n = 1; n <= without.num_calls; n += kEvery) {
    fake_cudart::reset();
    const Outcome outcome = execute_all([n] { fake_cudart::fail_call(n, kFault); });
    const bool is_free = outcome.call == "cudaFreeAsync" || outcome.call == "cudaGraphDestroy";
    EXPECT_EQ(outcome.num_failed + num_failed_captures_, is_free ? 0u : outcome.num_faults)
        << "call " << n << ", " << outcome.call << ": " << outcome.errors;
    num_hit += outcome.num_faults;
    num_fallbacks += num_failed_captures_;
    if (outcome.num_failed > 0) {
      EXPECT_NE(outcome.errors.find("cudaErrorIllegalState"), std::string::npos) << outcome.errors;
    }
    if (HasFailure())
      return;
  }
  EXPECT_GT(num_hit, without.num_calls / kEvery / 2);
  EXPECT_GT(num_fallbacks, 0u);
}

// No run to fail: the call throws the error, and nothing stays.
TEST_F(ModelFaultTest, fault_at_every_call_of_the_set_up_is_thrown_and_leaves_nothing) {
  plan_options_.granularity = Granularity::kNone;
  const auto set_up = [&] {
    make_model(tiny_);
    start(plan_options_);
  };
  set_up();
  const size_t num_calls = fake_cudart::num_calls();
  tear_down();
  size_t num_thrown = 0;
  for (size_t n = 1; n <= num_calls; n += kEvery) {
    fake_cudart::reset();
    fake_cudart::fail_call(n, kFault);
    bool is_thrown = false;
    try {
      set_up();
    } catch (const CudaError& error) {
      is_thrown = true;
      EXPECT_EQ(error.code(), kFault);
    }
    num_thrown += is_thrown ? 1 : 0;
    // Freeing may fail unseen, and a capture that fails leaves its segment eager.
    const std::string call = fake_cudart::last_fault();
    const bool may_pass = fake_cudart::num_faults() == 0 || call == "cudaGraphDestroy" ||
                          call == "cudaEventDestroy" || call == "cudaFreeHost" ||
                          call == "cudaFreeAsync" || call == "cudaStreamDestroy" ||
                          call == "cudaStreamSynchronize" ||
                          (model_ != nullptr && model_->graph_report().num_failed > 0);
    EXPECT_TRUE(is_thrown || may_pass) << "call " << n << ", " << call;
    tear_down();
    EXPECT_EQ(fake_cudart::live().handles(), 0)
        << "call " << n << ", " << call << ": " << fake_cudart::live().text();
    if (HasFailure())
      return;
  }
  EXPECT_GT(num_thrown, num_calls / kEvery / 2);
}

TEST_F(ModelFaultTest, call_that_takes_too_much_memory_throws) {
  const auto out_of_memory = [](const std::function<void()>& call) {
    try {
      call();
    } catch (const CudaError& error) {
      return error.is_out_of_memory();
    }
    return false;
  };
  fake_cudart::set_device_bytes(50'000);
  EXPECT_TRUE(out_of_memory([&] { CudaBackend model(tiny_.graph(), options_); }));
  fake_cudart::set_device_bytes(1 << 20);
  CudaBackend model(tiny_.graph(), options_);
  tiny_.load_into(model);
  EXPECT_TRUE(out_of_memory([&] { model.allocate_cache(kBlockTokens, 1'000'000); }));
  EXPECT_EQ(model.bytes_per_block(kBlockTokens), size_t{2} * 2 * 2 * 2 * 64 * kBlockTokens);
  EXPECT_GT(model.lane_bytes(kBlockTokens), size_t{64} * 64 * 4);
}

}  // namespace
}  // namespace flowprefill::testing
