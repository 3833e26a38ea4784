// LanePool: who gets which lane, what is copied, where spills go, what happens on errors.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "devices/cuda/runtime/lane_pool.h"
#include "devices/cuda/runtime/stream.h"
#include "fake_cudart.h"

namespace flowprefill::testing {
namespace {

constexpr size_t kLane = 128;

class LanePoolTest : public ::testing::Test {
 protected:
  void SetUp() override {
    fake_cudart::reset();
    options_ = {.num_lanes = 1, .lane_bytes = kLane, .input_bytes = 16, .scratch_bytes = 8};
    stream_ = std::make_unique<Stream>(Stream::make());
    pinned_ = std::make_unique<PinnedPool>(0);
  }
  void TearDown() override {
    pool_.reset();
    pinned_.reset();
    stream_.reset();
    EXPECT_EQ(fake_cudart::live().handles(), 0) << fake_cudart::live().text();
    EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess);
  }

  void make() { pool_ = std::make_unique<LanePool>(0, options_, *pinned_); }
  const LaneView& enter(Tenant& tenant) { return pool_->enter(tenant, stream_->get(), {}); }
  void drain() { stream_->synchronize(); }
  const LaneView& enter_and_drain(Tenant& tenant) {
    const LaneView& lane = enter(tenant);
    drain();
    return lane;
  }

  // Bytes of the lane, with nothing in flight.
  static void fill(const LaneView& lane, uint8_t seed) {
    for (size_t i = 0; i < kLane; ++i)
      lane.activations[i] = static_cast<std::byte>(seed + i);
  }
  static void expect_bytes(const LaneView& lane, const LiveSet& live, uint8_t seed) {
    for (const LiveRange& range : live.ranges()) {
      for (size_t i = range.offset; i < range.end(); ++i)
        ASSERT_EQ(lane.activations[i], static_cast<std::byte>(seed + i)) << "byte " << i;
    }
  }

  LaneOptions options_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<PinnedPool> pinned_;
  std::unique_ptr<LanePool> pool_;
  const LiveSet live_{{{8, 24}, {64, 1}, {100, 28}}};
};

TEST_F(LanePoolTest, tenant_keeps_its_lane_until_it_leaves) {
  options_.num_lanes = 2;
  make();
  Tenant a(*pool_, {});
  Tenant b(*pool_, {});
  EXPECT_EQ(enter(a).index, 0);
  EXPECT_EQ(enter(b).index, 1);
  EXPECT_EQ(enter(a).index, 0);
  EXPECT_NE(enter(a).activations, enter(b).activations);
  EXPECT_EQ(enter(a).scratch, enter(b).scratch) << "one scratch for all";
  pool_->leave(a);
  Tenant c(*pool_, {});
  EXPECT_EQ(enter(c).index, 0);
  EXPECT_EQ(pool_->report().num_spills, 0u);
}

TEST_F(LanePoolTest, exactly_the_live_bytes_are_copied_out_and_back) {
  make();
  Tenant a(*pool_, {});
  Tenant b(*pool_, {});
  fill(enter_and_drain(a), 1);
  a.keep(&live_);
  fill(enter_and_drain(b), 200);
  drain();
  EXPECT_FALSE(a.has_lane());
  EXPECT_EQ(pool_->report().spilled_bytes, live_.bytes());
  const size_t copies = fake_cudart::count("cudaMemcpyAsync");
  EXPECT_EQ(copies, live_.ranges().size());
  pool_->leave(b);
  const LaneView& lane = enter(a);
  drain();
  expect_bytes(lane, live_, 1);
  EXPECT_EQ(lane.activations[0], static_cast<std::byte>(200)) << "was not live: not restored";
  const LaneReport report = pool_->report();
  EXPECT_EQ(report.restored_bytes, live_.bytes());
  size_t copied = 0;
  for (const fake_cudart::Call& call : fake_cudart::calls())
    copied += call.name == "cudaMemcpyAsync" ? call.bytes : 0;
  EXPECT_EQ(copied, 2 * live_.bytes());
}

TEST_F(LanePoolTest, lane_entered_longest_ago_is_spilled) {
  options_.num_lanes = 2;
  make();
  std::vector<std::unique_ptr<Tenant>> tenants;
  for (int i = 0; i < 4; ++i) {
    tenants.push_back(std::make_unique<Tenant>(*pool_, std::span<const std::byte>()));
    const LaneView& lane = enter(*tenants.back());
    drain();
    fill(lane, static_cast<uint8_t>(10 * i));
    tenants.back()->keep(&live_);
  }
  EXPECT_FALSE(tenants[0]->has_lane());
  EXPECT_FALSE(tenants[1]->has_lane());
  EXPECT_TRUE(tenants[2]->has_lane());
  for (int i = 0; i < 4; ++i) {
    const LaneView& lane = enter(*tenants[static_cast<size_t>(i)]);
    drain();
    expect_bytes(lane, live_, static_cast<uint8_t>(10 * i));
  }
}

TEST_F(LanePoolTest, inputs_are_copied_whenever_a_lane_is_taken) {
  make();
  const std::vector<std::byte> inputs(16, std::byte{42});
  Tenant a(*pool_, inputs);
  Tenant b(*pool_, {});
  for (int round = 0; round < 2; ++round) {
    const LaneView& lane = enter(a);
    drain();
    EXPECT_EQ(std::memcmp(lane.inputs, inputs.data(), 16), 0);
    std::memset(lane.inputs, 0, 16);
    enter(b);
    drain();
  }
  EXPECT_EQ(pool_->report().spilled_bytes, 0u) << "nothing was live";
}

TEST_F(LanePoolTest, spills_beyond_the_budget_go_to_pinned_memory) {
  options_.device_spill_bytes = live_.bytes();
  make();
  std::vector<std::unique_ptr<Tenant>> tenants;
  for (int i = 0; i < 3; ++i) {
    tenants.push_back(std::make_unique<Tenant>(*pool_, std::span<const std::byte>()));
    const LaneView& lane = enter(*tenants.back());
    drain();
    fill(lane, static_cast<uint8_t>(10 * i));
    tenants.back()->keep(&live_);
  }
  EXPECT_EQ(pool_->report().device_spill_bytes, live_.bytes());
  EXPECT_EQ(pool_->report().pinned_spill_bytes, live_.bytes());
  for (int i = 0; i < 3; ++i) {
    const LaneView& lane = enter(*tenants[static_cast<size_t>(i)]);
    drain();
    expect_bytes(lane, live_, static_cast<uint8_t>(10 * i));
  }
}

TEST_F(LanePoolTest, spill_goes_to_pinned_memory_if_the_device_has_none_left) {
  make();
  Tenant a(*pool_, {});
  Tenant b(*pool_, {});
  fill(enter_and_drain(a), 3);
  a.keep(&live_);
  fake_cudart::fail_call_of("cudaMallocFromPoolAsync", 1, cudaErrorMemoryAllocation);
  enter(b);
  EXPECT_EQ(pool_->report().pinned_spill_bytes, live_.bytes());
  const LaneView& lane = enter(a);
  drain();
  expect_bytes(lane, live_, 3);
}

TEST_F(LanePoolTest, prepared_pool_has_the_memory_of_a_first_spill) {
  for (const size_t budget : {size_t{0}, size_t{100}, size_t{1000}}) {
    fake_cudart::reset();
    options_.device_spill_bytes = budget;
    make();
    pool_->prepare(stream_->get());
    std::vector<size_t> taken;
    for (const fake_cudart::Call& call : fake_cudart::calls()) {
      if (call.name == "cudaMallocFromPoolAsync")
        taken.push_back(call.bytes);
    }
    const size_t wanted = std::min(budget, kLane);
    EXPECT_EQ(taken, budget == 0 ? std::vector<size_t>{} : std::vector<size_t>{wanted});
    EXPECT_EQ(fake_cudart::count("cudaFreeAsync"), taken.size());
    EXPECT_EQ(pool_->report().device_spill_bytes, 0u);
    EXPECT_EQ(pool_->report().pinned_spill_bytes, 0u);
    pool_.reset();
  }
}

TEST_F(LanePoolTest, prepared_pool_pins_memory_where_the_device_has_none) {
  make();
  fake_cudart::fail_call_of("cudaMallocFromPoolAsync", 1, cudaErrorMemoryAllocation);
  const size_t before = pinned_->bytes();
  pool_->prepare(stream_->get());
  EXPECT_GE(pinned_->bytes(), before + kLane);
  Tenant a(*pool_, {});
  Tenant b(*pool_, {});
  fill(enter_and_drain(a), 3);
  a.keep(&live_);
  const size_t pins = fake_cudart::count("cudaHostAlloc");
  fake_cudart::fail_call_of("cudaMallocFromPoolAsync", 1, cudaErrorMemoryAllocation);
  enter(b);
  EXPECT_EQ(pool_->report().pinned_spill_bytes, live_.bytes());
  EXPECT_EQ(fake_cudart::count("cudaHostAlloc"), pins) << "nothing is pinned in a preemption";
  drain();
}

TEST_F(LanePoolTest, failed_spill_leaves_the_victim_where_it_is) {
  make();
  for (size_t failing_copy = 1; failing_copy <= live_.ranges().size(); ++failing_copy) {
    Tenant a(*pool_, {});
    Tenant b(*pool_, {});
    fill(enter_and_drain(a), 3);
    a.keep(&live_);
    fake_cudart::fail_call_of("cudaMemcpyAsync", failing_copy, cudaErrorInvalidValue);
    EXPECT_THROW(enter(b), CudaError);
    EXPECT_TRUE(a.has_lane());
    EXPECT_FALSE(b.has_lane());
    const LaneView& lane = enter(a);
    drain();
    expect_bytes(lane, live_, 3);
    EXPECT_EQ(pool_->report().num_spills, 0u);
  }
}

TEST_F(LanePoolTest, failed_restore_leaves_the_lane_free_and_can_be_tried_again) {
  make();
  Tenant a(*pool_, {});
  {
    Tenant b(*pool_, {});
    fill(enter_and_drain(a), 3);
    a.keep(&live_);
    enter(b);
  }
  drain();
  fake_cudart::fail_call_of("cudaMemcpyAsync", 2, cudaErrorInvalidValue);
  EXPECT_THROW(enter(a), CudaError);
  EXPECT_FALSE(a.has_lane());
  drain();
  const LaneView& lane = enter(a);
  drain();
  expect_bytes(lane, live_, 3);
}

// A suspended run is cancelled: its program ends on the cancelling thread, which must not call
// CUDA.
TEST_F(LanePoolTest, tenant_that_ends_elsewhere_leaves_its_storage_to_the_executor) {
  make();
  auto a = std::make_unique<Tenant>(*pool_, std::span<const std::byte>());
  Tenant b(*pool_, {});
  enter(*a);
  a->keep(&live_);
  enter(b);
  drain();
  const size_t calls = fake_cudart::num_calls();
  std::thread([&] { a.reset(); }).join();
  EXPECT_EQ(fake_cudart::num_calls(), calls);
  Tenant c(*pool_, {});
  enter(c);
  drain();
  EXPECT_EQ(fake_cudart::count("cudaFreeAsync"), 1u);
  EXPECT_EQ(pool_->report().device_spill_bytes, 0u);
}

}  // namespace
}  // namespace flowprefill::testing
