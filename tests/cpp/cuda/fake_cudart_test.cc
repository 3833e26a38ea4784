// The double itself: order in a stream, capture modes, errors, counting; and over it check(),
// pinned memory, noise and the clock.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "devices/cuda/backend/noise.h"
#include "devices/cuda/kernels/portable.h"
#include "devices/cuda/runtime/device_clock.h"
#include "devices/cuda/runtime/graph.h"
#include "devices/cuda/runtime/memory.h"
#include "devices/cuda/runtime/stream.h"
#include "devices/cuda/runtime/stream_event.h"
#include "fake_cudart.h"

namespace flowprefill::testing {
namespace {

class FakeCudart : public ::testing::Test {
 protected:
  void SetUp() override { fake_cudart::reset(); }
  void TearDown() override {
    EXPECT_EQ(fake_cudart::live().handles(), 0) << fake_cudart::live().text();
    fake_cudart::reset();
  }

  static void kernel(cudaStream_t stream, std::function<void()> work) {
    check(fake_cudart::launch_kernel(stream, std::move(work)), "cudaLaunchKernel");
  }

  // Runs it on a thread of its own, whose capture mode is then new.
  static void elsewhere(const std::function<void()>& work) { std::thread(work).join(); }
};

TEST_F(FakeCudart, stream_does_work_in_order_and_events_mark_it) {
  const Stream stream = Stream::make();
  const StreamEvent start = StreamEvent::make();
  const StreamEvent end = StreamEvent::make();
  std::atomic<bool> is_open{false};
  std::vector<int> order;
  start.record(stream.get());
  kernel(stream.get(), [&] {
    is_open.wait(false);
    order.push_back(1);
  });
  kernel(stream.get(), [&] { order.push_back(2); });
  end.record(stream.get());
  EXPECT_FALSE(end.is_done());
  EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess) << "not ready is no error to leave behind";
  is_open = true;
  is_open.notify_all();
  end.wait();
  EXPECT_TRUE(end.is_done());
  EXPECT_EQ(order, (std::vector{1, 2}));
  EXPECT_EQ(end.ns_since(start), 2000);
}

TEST_F(FakeCudart, captured_work_runs_when_launched_only) {
  const Stream stream = Stream::make();
  int runs = 0;
  const Graph graph =
      capture(stream.get(), [&](cudaStream_t s) { kernel(s, [&] { ++runs; }); }, {});
  EXPECT_EQ(graph.num_nodes(), 1u);
  const GraphExec exec(graph, stream.get(), {});
  stream.synchronize();
  EXPECT_EQ(runs, 0);
  exec.launch(stream.get(), {});
  exec.launch(stream.get(), {});
  stream.synchronize();
  EXPECT_EQ(runs, 2);
}

TEST_F(FakeCudart, executable_destroyed_in_flight_runs_to_its_end) {
  const Stream stream = Stream::make();
  std::atomic<bool> is_open{false};
  std::atomic<int> runs{0};
  {
    const Graph graph = capture(stream.get(),
                                [&](cudaStream_t s) {
                                  kernel(s, [&] { is_open.wait(false); });
                                  kernel(s, [&] { ++runs; });
                                },
                                {});
    const GraphExec exec(graph, stream.get(), {});
    exec.launch(stream.get(), {});
  }
  is_open = true;
  is_open.notify_all();
  stream.synchronize();
  EXPECT_EQ(runs, 1);
}

TEST_F(FakeCudart, capture_ends_whatever_is_thrown_inside) {
  const Stream stream = Stream::make();
  EXPECT_THROW(capture(stream.get(), [](cudaStream_t) { throw std::runtime_error("no"); }, {}),
               std::runtime_error);
  EXPECT_EQ(capture(stream.get(), [](cudaStream_t) {}, {}).num_nodes(), 0u);
}

TEST_F(FakeCudart, synchronising_a_stream_in_capture_breaks_it) {
  const Stream stream = Stream::make();
  const auto record = [&](cudaStream_t s) { ignore(cudaStreamSynchronize(s)); };
  try {
    capture(stream.get(), record, {});
    FAIL() << "capture went on";
  } catch (const CudaError& error) {
    EXPECT_EQ(error.code(), cudaErrorStreamCaptureInvalidated);
  }
}

TEST_F(FakeCudart, thread_local_capture_stands_queries_of_other_threads) {
  const Stream stream = Stream::make();
  const StreamEvent event = StreamEvent::make();
  const auto record = [&](cudaStream_t) {
    elsewhere([&] {
      EXPECT_TRUE(event.is_done());
      const DeviceBuffer buffer(16);
    });
  };
  EXPECT_NO_THROW(capture(stream.get(), record, {}));
}

// The trap: a library such as torch captures in global mode while the executor asks for an event.
TEST_F(FakeCudart, query_of_another_thread_breaks_a_global_capture_unless_its_mode_is_relaxed) {
  const Stream stream = Stream::make();
  const StreamEvent event = StreamEvent::make();
  for (const bool is_relaxed : {false, true}) {
    check(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeGlobal), "begin");
    elsewhere([&] {
      cudaStreamCaptureMode mode =
          is_relaxed ? cudaStreamCaptureModeRelaxed : cudaStreamCaptureModeGlobal;
      check(cudaThreadExchangeStreamCaptureMode(&mode), "exchange");
      EXPECT_EQ(cudaEventQuery(event.get()),
                is_relaxed ? cudaSuccess : cudaErrorStreamCaptureUnsupported);
    });
    cudaGraph_t graph = nullptr;
    EXPECT_EQ(cudaStreamEndCapture(stream.get(), &graph),
              is_relaxed ? cudaSuccess : cudaErrorStreamCaptureInvalidated);
    const Graph owner(graph);
  }
  EXPECT_EQ(cudaGetLastError(), cudaErrorStreamCaptureInvalidated);
}

TEST_F(FakeCudart, capture_must_end_on_its_thread) {
  const Stream stream = Stream::make();
  check(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal), "begin");
  cudaGraph_t graph = nullptr;
  elsewhere([&] {
    EXPECT_EQ(cudaStreamEndCapture(stream.get(), &graph), cudaErrorStreamCaptureWrongThread);
  });
  EXPECT_EQ(cudaStreamEndCapture(stream.get(), &graph), cudaSuccess);
  const Graph owner(graph);
}

TEST_F(FakeCudart, device_error_stays_and_stops_all_work) {
  const Stream stream = Stream::make();
  int runs = 0;
  kernel(stream.get(), [] { fake_cudart::break_device(cudaErrorIllegalAddress); });
  try {
    kernel(stream.get(), [&] { ++runs; });
  } catch (const CudaError&) {  // it broke before this launch
  }
  EXPECT_THROW(stream.synchronize(), CudaError);
  EXPECT_THROW(StreamEvent::make(), CudaError);
  EXPECT_EQ(runs, 0);
}

TEST_F(FakeCudart, faults_hit_the_counted_and_the_named_call) {
  fake_cudart::fail_call(2, cudaErrorInvalidValue);
  const Stream stream = Stream::make();
  EXPECT_THROW(StreamEvent::make(), CudaError);
  EXPECT_EQ(fake_cudart::num_faults(), 1u);
  EXPECT_EQ(fake_cudart::last_fault(), "cudaEventCreateWithFlags");
  fake_cudart::fail_call_of("cudaStreamSynchronize", 2, cudaErrorInvalidValue);
  stream.synchronize();
  EXPECT_THROW(stream.synchronize(), CudaError);
  stream.synchronize();
}

TEST_F(FakeCudart, memory_beyond_the_device_is_refused) {
  fake_cudart::set_device_bytes(100);
  const DeviceBuffer buffer(80);
  try {
    const DeviceBuffer more(21);
    FAIL() << "got memory that is not there";
  } catch (const CudaError& error) {
    EXPECT_TRUE(error.is_out_of_memory());
    EXPECT_EQ(error.call(), "cudaMalloc");
  }
}

TEST_F(FakeCudart, check_names_call_code_operator_and_layer_and_clears_the_record) {
  const Stream stream = Stream::make();
  fake_cudart::fail_call_of("cudaStreamSynchronize", 1, cudaErrorIllegalAddress);
  try {
    stream.synchronize({.op = "o_proj", .layer = 7});
    FAIL();
  } catch (const CudaError& error) {
    EXPECT_STREQ(
        error.what(),
        "cudaStreamSynchronize: cudaErrorIllegalAddress (700, an illegal memory access was "
        "encountered) in operator 'o_proj' of layer 7");
    EXPECT_EQ(error.context().layer, 7);
    EXPECT_STREQ(error.charged_to({.op = "other", .layer = 1}).context().op, "o_proj");
  }
  EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess);
  EXPECT_STREQ(CudaError(cudaErrorInvalidValue, "f", {}).charged_to({.op = "x"}).context().op, "x");
}

TEST_F(FakeCudart, pinned_blocks_are_used_again_by_size) {
  PinnedPool pool(0);
  std::byte* first = nullptr;
  {
    const PinnedBlock block = pool.take(5000);
    EXPECT_EQ(block.bytes(), 8192u);
    first = block.get();
    const PinnedBlock other = pool.take(5000);
    EXPECT_NE(other.get(), first);
    EXPECT_FALSE(pool.take(0));
  }
  PinnedBlock small = pool.take(1);
  EXPECT_EQ(small.bytes(), 4096u);
  small = pool.take(8192);
  EXPECT_EQ(fake_cudart::live().pinned_blocks, 3);
  EXPECT_EQ(pool.bytes(), 2u * 8192 + 4096);
}

TEST_F(FakeCudart, noise_fills_memory_with_finite_numbers_the_same_each_time) {
  const Stream stream = Stream::make();
  constexpr size_t kPiece = size_t{2} << 20;  // what comes from the host
  for (const size_t bytes : {size_t{0}, size_t{6}, 3 * kPiece + 10}) {
    const DeviceBuffer first(bytes);
    const DeviceBuffer second(bytes);
    fill_with_noise({first.get(), bytes}, stream.get());
    fill_with_noise({second.get(), bytes}, stream.get());
    if (bytes == 0)
      continue;
    EXPECT_EQ(std::memcmp(first.get(), second.get(), bytes), 0);
    std::vector<Bf16> numbers(bytes / sizeof(Bf16));
    std::memcpy(numbers.data(), first.get(), bytes);
    float sum = 0;
    for (const Bf16 number : numbers) {
      ASSERT_LE(std::abs(widen(number)), 1.0f);
      sum += std::abs(widen(number));
    }
    EXPECT_GT(sum / static_cast<float>(numbers.size()), 0.1f) << "no zeros";
  }
}

constexpr int64_t kNeverNs = int64_t{1} << 60;

// The event comes while the stream is idle, between the two readings around the call.
TEST_F(FakeCudart, clock_is_anchored_without_sleeping) {
  const Stream stream = Stream::make();
  const StreamEvent event = StreamEvent::make();
  DeviceClock clock(kNeverNs);
  for (const int64_t spin_ns : {int64_t{0}, kNeverNs}) {
    fake_cudart::reset();
    clock.forget();
    EXPECT_TRUE(clock.is_stale());
    const int64_t before_ns = now_ns();
    clock.anchor(stream.get(), {}, spin_ns);
    EXPECT_FALSE(clock.is_stale());
    EXPECT_EQ(fake_cudart::count("cudaEventSynchronize"), spin_ns == 0 ? 1u : 0u);
    event.record(stream.get());
    event.wait();
    EXPECT_GE(clock.time_of(event, {}), before_ns);
    EXPECT_LE(clock.time_of(event, {}), now_ns());
  }
}

TEST_F(FakeCudart, clock_is_stale_once_its_anchor_is_old) {
  const Stream stream = Stream::make();
  constexpr int64_t kAnchorNs = 1'000'000;
  DeviceClock clock(kAnchorNs);
  EXPECT_TRUE(clock.is_stale());
  const int64_t before_ns = now_ns();
  clock.anchor(stream.get(), {}, 0);
  const bool is_stale = clock.is_stale();
  EXPECT_TRUE(!is_stale || now_ns() - before_ns > kAnchorNs);
  std::this_thread::sleep_for(std::chrono::nanoseconds(2 * kAnchorNs));
  EXPECT_TRUE(clock.is_stale());
}

// A stream that is busy for some time: its event is put neither at the begin nor at the end of the
// wait for it, but in the middle. The kernel ends once the host waits, and not at once; the two
// times that it reads enclose the middle however long anything took.
TEST_F(FakeCudart, clock_takes_the_middle_of_what_is_not_known) {
  const Stream stream = Stream::make();
  const StreamEvent event = StreamEvent::make();
  DeviceClock clock(kNeverNs);
  int64_t waiting_ns = 0;
  int64_t open_ns = 0;
  kernel(stream.get(), [&] {
    while (fake_cudart::num_waiting() == 0)
      std::this_thread::yield();
    waiting_ns = now_ns();
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    open_ns = now_ns();
  });
  const int64_t before_ns = now_ns();
  clock.anchor(stream.get(), {}, 0);
  const int64_t after_ns = now_ns();
  event.record(stream.get());
  event.wait();
  EXPECT_GE(clock.time_of(event, {}), std::midpoint(before_ns, open_ns));
  EXPECT_LE(clock.time_of(event, {}), std::midpoint(waiting_ns, after_ns));
}

}  // namespace
}  // namespace flowprefill::testing
