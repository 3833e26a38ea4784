// CudaTest: the real executor, device, graph layer and lanes over the double, and a hook before
// each launch.
#pragma once

#include <gtest/gtest.h>
#include <poll.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../executor_fixture.h"
#include "devices/cuda/runtime/cuda_device.h"
#include "devices/cuda/runtime/cuda_program.h"
#include "runtime/executor.h"
#include "toy_model.h"

namespace flowprefill::testing {

inline constexpr double kNever = 1e6;  // seconds

// CudaDevice, with a hook on the executor's thread: what it dispatches or cancels is seen at an
// exactly known boundary.
class HookedDevice : public Device {
 public:
  using Hook = std::function<void(Program& program, size_t segment)>;

  HookedDevice(std::unique_ptr<Device> device, const Hook& before, const Hook& after)
      : device_(std::move(device)), before_(before), after_(after) {}

  void attach() override { device_->attach(); }
  void detach() noexcept override { device_->detach(); }
  void launch(Program& program, size_t i) override {
    if (before_)
      before_(program, i);
    device_->launch(program, i);
    if (after_)
      after_(program, i);
  }
  void throttle() override { device_->throttle(); }
  void drain() override { device_->drain(); }
  bool has_segment_times() const override { return device_->has_segment_times(); }
  bool take_segment_time(SegmentTime& time) override { return device_->take_segment_time(time); }

 private:
  const std::unique_ptr<Device> device_;
  const Hook& before_;
  const Hook& after_;
};

// Runs of programs P under the real executor over the double; nothing is left at the end.
template <typename P>
class DoubleTest : public ::testing::Test {
 protected:
  void SetUp() override { fake_cudart::reset(); }

  void TearDown() override {
    tear_down();
    EXPECT_EQ(fake_cudart::live().handles(), 0) << "left: " << fake_cudart::live().text();
    EXPECT_EQ(fake_cudart::live().device_bytes, 0u);
    EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess) << "an error was handled but not cleared";
  }

  // Everything that holds handles.
  virtual void tear_down() {
    executor_.reset();
    before_launch_ = nullptr;
    after_launch_ = nullptr;
    programs_.clear();
    runs_.clear();
    events_.clear();
  }

  void start_on(std::unique_ptr<Device> device) {
    executor_ = std::make_unique<Executor>(
        std::make_unique<HookedDevice>(std::move(device), before_launch_, after_launch_));
    executor_->start();
  }

  void add(uint32_t id, std::unique_ptr<P> program) {
    programs_[id] = program.get();
    runs_[id] = make_run(id, std::move(program));
  }
  void dispatch(uint32_t id) { executor_->dispatch(runs_.at(id)); }
  void wait_for(size_t num_terminal) {
    wait_for_terminal(executor_->events(), events_, num_terminal);
  }

  // Before about every third launch, one of the runs 1..count that has not ended is dispatched.
  void dispatch_at_random(std::mt19937& random, uint32_t count) {
    const uint32_t id = 1 + random() % count;
    if (random() % 3 == 0 && !is_terminal(runs_.at(id)->state()))
      dispatch(id);
  }
  // Dispatches the runs 1..count until all have ended: again whenever another displaced one.
  void execute_all(uint32_t count) {
    for (uint32_t id = 1; id <= count; ++id) {
      while (!is_terminal(runs_.at(id)->state())) {
        try {
          dispatch(id);
        } catch (const std::invalid_argument&) {
          break;  // reported: it ended just now
        }
        pollfd descriptor{.fd = executor_->events().fd(), .events = POLLIN, .revents = 0};
        poll(&descriptor, 1, 1);
        executor_->events().pop_all(events_);
      }
    }
    wait_for(count);
  }

  // Whether `program` is that of run `id`.
  bool is(const Program& program, uint32_t id) const {
    const auto found = programs_.find(id);
    return found != programs_.end() && found->second == &program;
  }

  std::unique_ptr<Executor> executor_;
  std::map<uint32_t, RunRef> runs_;
  std::map<uint32_t, P*> programs_;
  std::vector<Event> events_;
  HookedDevice::Hook before_launch_;  // set before start()
  HookedDevice::Hook after_launch_;
};

class CudaTest : public DoubleTest<CudaProgram> {
 protected:
  void tear_down() override {
    DoubleTest::tear_down();
    resources_.reset();
  }

  void make_resources() {
    options_.lanes.lane_bytes = kLaneBytes;
    options_.lanes.input_bytes = kInputBytes;
    options_.lanes.scratch_bytes = kScratchBytes;
    resources_ = std::make_shared<CudaResources>(options_);
  }

  // Polling, and a new anchor of the clock after some time, would make the number of calls depend
  // on time. So tests sleep on the event at once, and no anchor grows old.
  void start(int run_ahead = 2) {
    if (resources_ == nullptr)
      make_resources();
    device_options_.run_ahead = run_ahead;
    start_on(std::make_unique<CudaDevice>(resources_, device_options_));
  }

  RunRef make(uint32_t id, const std::shared_ptr<const CudaPlan>& plan) {
    add(id, std::make_unique<CudaProgram>(resources_, plan, kBucket, ToyModel::inputs(id)));
    return runs_[id];
  }

  size_t count(EventKind kind) {
    executor_->events().pop_all(events_);
    return static_cast<size_t>(std::ranges::count(events_, kind, &Event::kind));
  }

  void expect_finished(ToyModel& model, uint32_t id) {
    ASSERT_EQ(runs_.at(id)->state(), RunState::kFinished) << runs_.at(id)->error();
    const auto expected = model.expected(id);
    ASSERT_EQ(programs_.at(id)->result().size(), sizeof(expected));
    EXPECT_EQ(std::memcmp(programs_.at(id)->result().data(), expected.data(), sizeof(expected)), 0)
        << "run " << id << " has a wrong result";
  }

  CudaOptions options_;
  CudaDeviceOptions device_options_{.run_ahead = 2, .spin_s = 0, .anchor_s = kNever, .prepare = {}};
  std::shared_ptr<CudaResources> resources_;
};

}  // namespace flowprefill::testing
