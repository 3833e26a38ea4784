// Whole models on the device under the real executor: against a plain transformer, graphs against
// eager launches, preempted at every boundary, after a failure.
#include <poll.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <thread>

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
constexpr int32_t kBlocksOfOne = 8;  // of each sequence
constexpr int32_t kSequences = 3;
constexpr int kPatienceMs = 30000;

// A device that asks for the suspension of a run while its segment before `boundary` is launched.
class StoppingDevice final : public Device {
 public:
  struct Stop {
    RunRef run;
    size_t boundary = 0;
  };

  StoppingDevice(std::unique_ptr<Device> device, const Stop& stop)
      : device_(std::move(device)), stop_(stop) {}

  void attach() override { device_->attach(); }
  void detach() noexcept override { device_->detach(); }
  void launch(Program& program, size_t i) override {
    if (stop_.run && &stop_.run->program() == &program && i + 1 == stop_.boundary)
      stop_.run->request_suspend();
    device_->launch(program, i);
  }
  void throttle() override { device_->throttle(); }
  void drain() override { device_->drain(); }
  bool has_segment_times() const override { return device_->has_segment_times(); }
  bool take_segment_time(SegmentTime& time) override { return device_->take_segment_time(time); }

 private:
  const std::unique_ptr<Device> device_;
  const Stop& stop_;  // changed only while no run is executed
};

class Model : public DeviceTest {
 protected:
  void SetUp() override {
    DeviceTest::SetUp();
#ifdef FP_GPU_DOUBLE
    fake_kernels::use_bodies(false);  // plain loops: the tests beside this one run the bodies
#endif
    options_.max_tokens = 128;
    options_.max_sequences = 4;
    options_.max_context = kBlocksOfOne * kBlockTokens;
  }
  void TearDown() override {
    close();
    DeviceTest::TearDown();
  }

  void open(const TinyModel& tiny) {
    close();
    model_.emplace(tiny.graph(), options_);
    tiny.load_into(*model_);
    model_->allocate_cache(kBlockTokens, kSequences * kBlocksOfOne);
    executor_ =
        std::make_unique<Executor>(std::make_unique<StoppingDevice>(model_->make_device(), stop_));
    executor_->start();
  }
  void close() {
    executor_.reset();
    stop_ = {};
    model_.reset();
  }

  // All tokens of a prompt, into blocks of its own.
  RunRef make(int32_t sequence, const std::vector<int32_t>& tokens,
              const ProgramOptions& program = {}) {
    Sequence s{.row_begin = 0,
               .rows = static_cast<int32_t>(tokens.size()),
               .context = 0,
               .block_table = {}};
    for (int32_t i = 0; i < kBlocksOfOne; ++i)
      s.block_table.push_back(sequence + kSequences * ((i * 3 + 1) % kBlocksOfOne));
    Batch batch;
    batch.sequences.push_back(std::move(s));
    batch.tokens = tokens;
    return make_run(++next_id_, model_->make_program(std::move(batch), plan_, program));
  }

  // Until it stands at a boundary or has ended.
  void execute(const RunRef& run) {
    executor_->dispatch(run);
    std::vector<Event> events;
    for (int ms = 0;
         std::ranges::none_of(events, [&](const Event& e) { return e.run_id == run->id(); });
         ++ms) {
      ASSERT_LT(ms, kPatienceMs) << "no event of the run";
      pollfd wait{.fd = executor_->events().fd(), .events = POLLIN, .revents = 0};
      poll(&wait, 1, 1);  // a suspension does not make the descriptor readable
      executor_->events().pop_all(events);
    }
    while (run->state() == RunState::kRunning)  // a suspension is told just before it is so
      std::this_thread::yield();
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

  void preempt_everywhere(const TinyModel& tiny) {
    options_.num_lanes = 1;  // so that each suspension spills and each resumption restores
    open(tiny);
    const std::vector<int32_t> mine = tiny.random_tokens(100, 1);
    const std::vector<int32_t> others = tiny.random_tokens(60, 2);
    const std::vector<float> undisturbed = logits_of(0, mine);
    const std::vector<float> of_others = logits_of(1, others);
    const size_t num_segments = make(0, mine)->num_segments();
    ASSERT_GT(num_segments, 3u);
    for (size_t boundary = 1; boundary < num_segments; ++boundary) {
      const RunRef run = make(0, mine);
      stop_ = {run, boundary};
      execute(run);
      ASSERT_EQ(run->state(), RunState::kSuspended) << run->error();
      ASSERT_EQ(run->cursor(), boundary);
      EXPECT_EQ(logits_of(1, others), of_others);
      stop_ = {};
      execute(run);
      EXPECT_EQ(logits(run), undisturbed) << "preempted before segment " << boundary;
    }
    EXPECT_EQ(model_->lane_report().num_spills, num_segments - 1);
  }

  CudaBackendOptions options_;
  PlanOptions plan_;
  std::optional<CudaBackend> model_;
  StoppingDevice::Stop stop_;
  std::unique_ptr<Executor> executor_;
  uint64_t next_id_ = 0;
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

TEST_F(Model, PreemptedAtEveryBoundaryByOperators) {
  plan_.granularity = Granularity::kOperator;
  preempt_everywhere(TinyModel(Kind::kQwen, 2));
}

TEST_F(Model, PreemptedAtEveryBoundaryWithoutGraphs) {
  options_.has_graphs = false;
  plan_.granularity = Granularity::kOperator;
  preempt_everywhere(TinyModel(Kind::kWindow, 2));
}

TEST_F(Model, AFailureEndsOneRunAndNoOther) {
  const TinyModel tiny(Kind::kLlama, 2);
  plan_.granularity = Granularity::kOperator;
  open(tiny);
  const std::vector<int32_t> tokens = tiny.random_tokens(50, 4);
  const std::vector<float> want = logits_of(0, tokens);
  for (const int64_t segment : {0, 3}) {
    const RunRef run = make(1, tokens, {.fail_at = segment});
    execute(run);
    EXPECT_EQ(run->state(), RunState::kFailed);
    EXPECT_NE(run->error().find("injected"), std::string::npos) << run->error();
    EXPECT_EQ(logits_of(0, tokens), want);
  }
}

}  // namespace
}  // namespace flowprefill::testing
