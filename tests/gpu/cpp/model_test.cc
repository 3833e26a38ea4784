// Whole models on the device, for compute-sanitizer: against a plain transformer, graphs against
// eager launches. tests/device preempts them, and has them fail.
#include <poll.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "device_test.h"
#include "devices/cuda/backend/cuda_backend.h"
#include "runtime/executor.h"
#include "tiny_model.h"
#ifdef FP_GPU_DOUBLE
#include "host_kernels.h"
#endif

namespace flowprefill::testing {
namespace {

constexpr int32_t kBlockTokens = 16;
constexpr int32_t kSequences = 3;
constexpr int kPatienceMs = 30000;

class Model : public DeviceTest {
 protected:
  void SetUp() override {
    DeviceTest::SetUp();
#ifdef FP_GPU_DOUBLE
    fake_kernels::use_bodies(false);  // plain loops: the other tests here run the bodies
#endif
    options_.max_tokens = 128;
    options_.max_sequences = 4;
    options_.max_context = blocks_of_one_ * kBlockTokens;
  }
  void TearDown() override {
    close();
    DeviceTest::TearDown();
  }

  void open(const TinyModel& tiny) {
    close();
    model_.emplace(tiny.graph(), options_);
    tiny.load_into(*model_);
    model_->allocate_cache(kBlockTokens, kSequences * blocks_of_one_);
    executor_ = std::make_unique<Executor>(model_->make_device());
    executor_->start();
  }
  void close() {
    executor_.reset();
    model_.reset();
  }

  // All tokens of a prompt, into blocks of its own.
  RunRef make(int32_t sequence, const std::vector<int32_t>& tokens) {
    Sequence s{.row_begin = 0,
               .rows = static_cast<int32_t>(tokens.size()),
               .context = 0,
               .block_table = {}};
    for (int32_t i = 0; i < blocks_of_one_; ++i)
      s.block_table.push_back(sequence + kSequences * ((i * 3 + 1) % blocks_of_one_));
    Batch batch;
    batch.sequences.push_back(std::move(s));
    batch.tokens = tokens;
    return make_run(++next_id_, model_->make_program(std::move(batch), plan_, {}));
  }

  void execute(const RunRef& run) {
    executor_->dispatch(run);
    std::vector<Event> events;
    for (int ms = 0; events.empty(); ++ms) {
      ASSERT_LT(ms, kPatienceMs) << "no event of the run";
      pollfd wait{.fd = executor_->events().fd(), .events = POLLIN, .revents = 0};
      poll(&wait, 1, 1);
      executor_->events().pop_all(events);
    }
  }

  static std::vector<float> logits(const RunRef& run) {
    EXPECT_EQ(run->state(), RunState::kFinished) << run->error();
    const auto& program = dynamic_cast<const ModelProgram&>(run->program());
    return {program.logits(), program.logits() + program.vocab_size()};
  }
  std::vector<float> logits_of(int32_t sequence, const std::vector<int32_t>& tokens) {
    const RunRef run = make(sequence, tokens);
    execute(run);
    return logits(run);
  }

  // Sums in another order tip the rounding of a bf16 now and then: a share of the logits' spread.
  static void expect_close(const std::vector<float>& got, const std::vector<float>& want) {
    double spread = 0;
    double error = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      spread += double{want[i]} * want[i];
      error = std::isnan(got[i]) ? 1e9 : std::max(error, std::abs(double{got[i]} - want[i]));
    }
    EXPECT_LT(error, 0.05 * std::sqrt(spread / static_cast<double>(want.size())));
  }

  CudaBackendOptions options_;
  PlanOptions plan_;
  std::optional<CudaBackend> model_;
  std::unique_ptr<Executor> executor_;
  uint64_t next_id_ = 0;
  int32_t blocks_of_one_ = 8;  // of each sequence; no multiple of 3
};

TEST_F(Model, GivesTheLogitsOfThePlainTransformer) {
  for (const Kind kind : {Kind::kLlama, Kind::kQwen, Kind::kWindow, Kind::kTied}) {
    const TinyModel tiny(kind, 3);
    open(tiny);
    for (const int32_t count : {1, 37, 100}) {
      SCOPED_TRACE(count);
      const std::vector<int32_t> tokens = tiny.random_tokens(count, 7);
      expect_close(logits_of(1, tokens), tiny.logits(tokens));
    }
  }
}

// A segment's first launch is eager, its second captures, the third replays.
TEST_F(Model, GraphsGiveTheBitsOfEagerLaunches) {
  const TinyModel tiny(Kind::kQwen, 2);
  options_.warm_tokens = 0;
  plan_.granularity = Granularity::kOperator;
  open(tiny);
  const std::vector<int32_t> tokens = tiny.random_tokens(64, 3);
  const std::vector<float> eager = logits_of(0, tokens);
  EXPECT_EQ(model_->graph_report().num_replayed, 0u);
  for (int i = 0; i < 3; ++i)
    EXPECT_EQ(logits_of(0, tokens), eager);
  const GraphReport report = model_->graph_report();
  EXPECT_GT(report.num_captured, 0u);
  EXPECT_GT(report.num_replayed, report.num_captured);
  EXPECT_EQ(report.num_failed, 0u) << report.last_failure;
}

// Beyond 32k tokens Hopper's attention takes keys in chunks: wherever a plan cuts, the same bits.
TEST_F(Model, LargeContextsHaveTheSameBitsHoweverTheyAreCut) {
  blocks_of_one_ = kIsDouble ? 8 : 2200;
  options_.max_tokens = options_.max_context = blocks_of_one_ * kBlockTokens;
  const TinyModel tiny(Kind::kLlama, 2);
  const std::vector<int32_t> tokens = tiny.random_tokens(options_.max_tokens - 27, 5);
  open(tiny);
  plan_.granularity = Granularity::kNone;
  const std::vector<float> whole = logits_of(1, tokens);
  for (const Granularity granularity : {Granularity::kBudget, Granularity::kOperator}) {
    plan_.granularity = granularity;
    EXPECT_EQ(logits_of(1, tokens), whole);
  }
  options_.attention = "portable";
  open(tiny);
  expect_close(logits_of(1, tokens), whole);
}

}  // namespace
}  // namespace flowprefill::testing
