// Whole programs through the real executor on the double: order, results, run-ahead, times, capture
// modes.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <numeric>
#include <thread>
#include <vector>

#include "cuda_fixture.h"

namespace flowprefill::testing {
namespace {

using Steps = std::vector<ToyModel::Step>;

Steps in_order(uint32_t run_id, size_t num_segments) {
  Steps steps;
  for (size_t i = 0; i < num_segments; ++i)
    steps.emplace_back(run_id, i);
  return steps;
}

class CudaExecutorTest : public CudaTest {
 protected:
  void wait_until(const std::function<bool()>& is_true) {
    for (int i = 0; i < kTimeoutMs && !is_true(); ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    ASSERT_TRUE(is_true());
  }
};

TEST_F(CudaExecutorTest, eager_captured_and_replayed_runs_execute_the_same_in_order) {
  options_.lanes.num_lanes = 1;
  ToyModel model(3);
  start();
  const auto plan = model.plan();
  Steps expected;
  for (uint32_t id = 1; id <= 4; ++id) {
    make(id, plan);
    dispatch(id);
    wait_for(id);
    expect_finished(model, id);
    const Steps steps = in_order(id, model.num_segments());
    expected.insert(expected.end(), steps.begin(), steps.end());
  }
  EXPECT_EQ(model.steps(), expected);
  const GraphReport report = resources_->graphs().report();
  const size_t num_capturable = model.num_segments() - 3;  // without attention
  EXPECT_EQ(report.num_captured, num_capturable) << "in the second run";
  EXPECT_EQ(report.num_replayed, 3 * num_capturable);
  EXPECT_EQ(report.num_executables, static_cast<size_t>(fake_cudart::live().execs));
  EXPECT_EQ(fake_cudart::live().graphs, 0) << "a graph is not needed once it is instantiated";
}

TEST_F(CudaExecutorTest, attention_in_graphs_too_gives_the_same_result) {
  options_.lanes.num_lanes = 1;
  ToyModel model(2);
  start();
  const auto plan = model.plan(kBucket, false);
  for (uint32_t id = 1; id <= 3; ++id) {
    make(id, plan);
    dispatch(id);
    wait_for(id);
    expect_finished(model, id);
  }
  EXPECT_EQ(fake_cudart::count("cudaGraphLaunch"), 2 * model.num_segments());
}

TEST_F(CudaExecutorTest, plan_without_bucket_is_never_captured) {
  ToyModel model(2);
  start();
  for (uint32_t id = 1; id <= 3; ++id) {
    make(id, model.plan(0));
    dispatch(id);
    wait_for(id);
    expect_finished(model, id);
  }
  EXPECT_EQ(fake_cudart::count("cudaStreamBeginCapture"), 0u);
}

TEST_F(CudaExecutorTest, warmed_programs_replay_from_the_first_run) {
  ToyModel model(2);
  make_resources();
  const auto plan = model.plan();
  device_options_.prepare = [&] { resources_->graphs().warm(capture_requests(*resources_, plan)); };
  start();
  const size_t num_captures = fake_cudart::count("cudaStreamBeginCapture");
  EXPECT_EQ(num_captures, 2 * (model.num_segments() - 2)) << "in each of two lanes";
  make(1, plan);
  dispatch(1);
  wait_for(1);
  expect_finished(model, 1);
  EXPECT_EQ(fake_cudart::count("cudaStreamBeginCapture"), num_captures);
  EXPECT_EQ(fake_cudart::count("cudaGraphLaunch"), model.num_segments() - 2);
  device_options_.prepare = nullptr;
}

// The stream is stopped in the first segment: the host gets exactly so far ahead, and sleeps.
TEST_F(CudaExecutorTest, host_runs_ahead_by_the_depth_and_no_further) {
  for (int depth = 1; depth <= CudaDevice::kMaxRunAhead; ++depth) {
    ToyModel model(4);
    std::atomic<bool> is_open{false};
    std::atomic<int> num_launched{0};
    std::atomic<int> num_done{0};
    std::atomic<int> max_in_flight{0};
    model.on_segment = [&](uint32_t, size_t) {
      is_open.wait(false);
      ++num_done;
    };
    after_launch_ = [&](Program&, size_t) {
      const int in_flight = ++num_launched - num_done;
      max_in_flight = std::max(max_in_flight.load(), in_flight);
    };
    start(depth);
    make(1, model.plan());
    dispatch(1);
    // Before the first launch it waits for the clock's anchor: that is not meant.
    wait_until([&] { return num_launched > depth && fake_cudart::num_waiting() == 1; });
    EXPECT_EQ(num_launched, depth + 1) << "depth " << depth;
    is_open = true;
    is_open.notify_all();
    wait_for(1);
    if (HasFailure())
      return;  // not the time limit again for each depth
    expect_finished(model, 1);
    EXPECT_EQ(max_in_flight, depth + 1);
    EXPECT_EQ(fake_cudart::count("cudaStreamSynchronize"), 0u) << "the stream is never waited for";
    tear_down();
    fake_cudart::reset();
  }
}

// Dispatched while the host has depth segments in flight and launches one more.
TEST_F(CudaExecutorTest, urgent_run_waits_for_at_most_depth_plus_one_segments) {
  for (int depth = 1; depth <= CudaDevice::kMaxRunAhead; ++depth) {
    ToyModel model(5);
    std::atomic<size_t> num_done{0};
    std::atomic<size_t> done_at_dispatch{0};
    model.on_segment = [&](uint32_t run_id, size_t) { num_done += run_id == 1 ? 1 : 0; };
    before_launch_ = [&](Program& program, size_t segment) {
      if (is(program, 1) && segment == 7) {
        done_at_dispatch = num_done.load();
        dispatch(2);
      }
    };
    start(depth);
    make(1, model.plan());
    make(2, model.plan());
    dispatch(1);
    wait_for(1);
    expect_finished(model, 2);
    const Steps steps = model.steps();
    const auto first = std::ranges::find(steps, Steps::value_type{2, 0}) - steps.begin();
    EXPECT_LE(static_cast<size_t>(first) - done_at_dispatch, static_cast<size_t>(depth) + 1);
    EXPECT_EQ(first, 8) << "segment 7 was being launched: nothing of run 1 comes after it";
    dispatch(1);
    wait_for(2);
    expect_finished(model, 1);
    tear_down();
    fake_cudart::reset();
  }
}

// Kernels cost 1 us of the device's clock each, copies nothing: qkv has two kernels, all others
// one.
TEST_F(CudaExecutorTest, timeline_has_the_times_of_the_device) {
  ToyModel model(3);
  const int64_t before_ns = now_ns();
  start(3);
  for (uint32_t id = 1; id <= 3; ++id) {  // eager, captured, replayed
    make(id, model.plan());
    dispatch(id);
    wait_for(id);
  }
  executor_->stop();
  const TimelineSnapshot snapshot = executor_->timeline().snapshot();
  ASSERT_EQ(snapshot.records.size(), 3 * model.num_segments());
  for (size_t i = 0; i < snapshot.records.size(); ++i) {
    const TimelineRecord& record = snapshot.records[i];
    EXPECT_EQ(record.run_id, 1 + i / model.num_segments());
    EXPECT_EQ(record.segment, i % model.num_segments());
    const int64_t kernels = std::string(record.label.op) == "qkv_proj" ? 2 : 1;
    EXPECT_EQ(record.end_ns - record.start_ns, kernels * kKernelNs) << "record " << i;
    if (record.segment > 0) {
      EXPECT_EQ(record.start_ns, snapshot.records[i - 1].end_ns);
    }
  }
  // On the host's scale; what follows is as far away as the device's clock says, however long it
  // took here.
  EXPECT_GE(snapshot.records.front().start_ns, before_ns);
  EXPECT_LE(snapshot.records.front().start_ns, now_ns());
}

// The stream is stopped in the first segment: the others come behind it.
TEST_F(CudaExecutorTest, segments_that_come_behind_another_have_one_event) {
  ToyModel model(3);
  std::atomic<bool> is_open{false};
  model.on_segment = [&](uint32_t, size_t) { is_open.wait(false); };
  start(2);
  make(1, model.plan(0));
  dispatch(1);
  wait_until([] { return fake_cudart::count("cudaEventSynchronize") == 2; });  // anchor, segment 0
  EXPECT_EQ(fake_cudart::count("cudaEventRecord"), 1u + 2 + 1 + 1);
  is_open = true;
  is_open.notify_all();
  wait_for(1);
  expect_finished(model, 1);
}

TEST_F(CudaExecutorTest, waiting_by_polling_gives_the_same) {
  device_options_.spin_s = kNever;
  ToyModel model(3);
  std::atomic<bool> is_open{false};
  model.on_segment = [&](uint32_t, size_t segment) {
    if (segment == 2)
      is_open.wait(false);
  };
  start();
  make(1, model.plan());
  dispatch(1);
  wait_until([] { return fake_cudart::count("cudaEventQuery") > 10; });
  is_open = true;
  is_open.notify_all();
  wait_for(1);
  expect_finished(model, 1);
  EXPECT_EQ(fake_cudart::count("cudaEventSynchronize"), 0u) << "the clock's anchor polls too";
}

// torch, say, captures in global mode on another thread while the executor works, polls and
// captures.
TEST_F(CudaExecutorTest, capture_of_another_thread_in_global_mode_is_not_broken) {
  device_options_.spin_s = 1e-3;
  ToyModel model(3);
  start();
  const Stream stream = Stream::make();
  for (uint32_t id = 1; id <= 3; ++id)
    make(id, model.plan());
  check(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeGlobal), "begin");
  for (uint32_t id = 1; id <= 3; ++id) {
    dispatch(id);
    wait_for(id);
    expect_finished(model, id);
  }
  cudaGraph_t graph = nullptr;
  EXPECT_EQ(cudaStreamEndCapture(stream.get(), &graph), cudaSuccess);
  const Graph owner(graph);
  EXPECT_GT(resources_->graphs().report().num_replayed, 0u);
}

// And the other way: another thread allocates while the executor captures.
TEST_F(CudaExecutorTest, own_captures_stand_what_other_threads_do) {
  ToyModel model(2);
  std::atomic<int> num_allocations{0};
  model.on_launch = [&](size_t) {
    std::thread([&] {
      const DeviceBuffer buffer(16);
      ++num_allocations;
    }).join();
  };
  start();
  for (uint32_t id = 1; id <= 2; ++id) {
    make(id, model.plan());
    dispatch(id);
    wait_for(id);
    expect_finished(model, id);
  }
  EXPECT_GT(num_allocations, 0);
  EXPECT_EQ(resources_->graphs().report().num_failed, 0u);
}

TEST_F(CudaExecutorTest, thousand_runs_leave_memory_as_it_was) {
  ToyModel model(2);
  start();
  const auto plan = model.plan();
  fake_cudart::Live after_few;
  for (uint32_t id = 1; id <= 1000; ++id) {
    make(id, plan);
    dispatch(id);
    wait_for_terminal(executor_->events(), events_, 1);
    expect_finished(model, id);
    events_.clear();
    runs_.erase(id);
    programs_.erase(id);
    if (id == 5)
      after_few = fake_cudart::live();
  }
  EXPECT_EQ(fake_cudart::live().text(), after_few.text());
  EXPECT_EQ(fake_cudart::live().device_bytes, after_few.device_bytes);
}

}  // namespace
}  // namespace flowprefill::testing
