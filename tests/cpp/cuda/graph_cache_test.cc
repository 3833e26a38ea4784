// GraphCache: when it captures, what it keeps, what makes room, what it does when a capture fails.
#include <gtest/gtest.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "devices/cuda/runtime/graph_cache.h"
#include "fake_cudart.h"

namespace flowprefill::testing {
namespace {

constexpr size_t kExecBytes = fake_cudart::kBytesPerNode;

class GraphCacheTest : public ::testing::Test {
 protected:
  void SetUp() override {
    fake_cudart::reset();
    options_.eager_launches = 0;
  }
  void TearDown() override {
    cache_.reset();
    EXPECT_EQ(fake_cudart::live().handles(), 0) << fake_cudart::live().text();
    EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess);
  }

  void make() { cache_ = std::make_unique<GraphCache>(options_); }

  static GraphKey key(int32_t layer, int32_t bucket = 8) {
    return {.shape = {.first_op = layer}, .bucket = bucket};
  }

  // One kernel; the order of captures is noted.
  GraphCache::Record record(int32_t layer) {
    return [this, layer](cudaStream_t stream) {
      recorded_.push_back(layer);
      check(fake_cudart::launch_kernel(stream, [] {}), "cudaLaunchKernel");
    };
  }

  bool get(int32_t layer) {
    return cache_->get(key(layer), record(layer), {"qkv", layer}) != nullptr;
  }

  GraphCacheOptions options_;
  std::unique_ptr<GraphCache> cache_;
  std::vector<int32_t> recorded_;
};

TEST_F(GraphCacheTest, captures_once_after_the_eager_launches) {
  options_.eager_launches = 2;
  make();
  EXPECT_FALSE(get(1));
  EXPECT_FALSE(get(1));
  EXPECT_TRUE(recorded_.empty()) << "an eager launch is the caller's";
  EXPECT_TRUE(get(1));
  EXPECT_TRUE(get(1));
  EXPECT_EQ(recorded_, (std::vector{1}));
  const GraphReport report = cache_->report();
  EXPECT_EQ(report.num_captured, 1u);
  EXPECT_EQ(report.num_replayed, 2u);
  EXPECT_EQ(report.bytes, kExecBytes);
  EXPECT_GT(report.capture_s, 0.0);
}

TEST_F(GraphCacheTest, keys_differ_in_every_part) {
  make();
  GraphKey base;
  std::vector<GraphKey> keys(10, base);
  keys[1].shape.first_op = 1;
  keys[2].shape.last_op = 1;
  keys[3].shape.part_begin = 1;
  keys[4].shape.part_end = 1;
  keys[5].shape.row_begin = 1;
  keys[6].shape.row_end = 1;
  keys[7].bucket = 1;
  keys[8].lane = 1;
  keys[9].shape.variant = 1;
  for (const GraphKey& each : keys)
    EXPECT_NE(cache_->get(each, record(0), {}), nullptr);
  EXPECT_EQ(cache_->report().num_executables, keys.size());
}

TEST_F(GraphCacheTest, least_recently_used_makes_room_for_a_segment_asked_for_again) {
  options_.max_executables = 2;
  make();
  EXPECT_TRUE(get(1));
  EXPECT_TRUE(get(2));
  EXPECT_FALSE(get(3)) << "asked for once: nothing is thrown out for it";
  EXPECT_TRUE(get(2));
  EXPECT_TRUE(get(3)) << "1 was not used since";
  EXPECT_TRUE(get(2));
  EXPECT_FALSE(get(1));
  const GraphReport report = cache_->report();
  EXPECT_EQ(report.num_evicted, 1u);
  EXPECT_EQ(report.num_executables, 2u);
  EXPECT_EQ(fake_cudart::live().execs, 2);
}

TEST_F(GraphCacheTest, segments_not_asked_for_in_long_are_forgotten_and_executables_stay) {
  options_.eager_launches = 1;
  options_.max_executables = 1;
  options_.max_remembered = 2;
  make();
  EXPECT_FALSE(get(1));
  EXPECT_TRUE(get(1));
  for (int layer = 2; layer < 9; ++layer)
    EXPECT_FALSE(get(layer));
  EXPECT_FALSE(get(2)) << "as if for the first time";
  EXPECT_TRUE(get(1));
}

// Four segments in turn with room for three: those that fit stay, the fourth is always eager.
TEST_F(GraphCacheTest, program_larger_than_the_budget_does_not_evict_its_own_segments) {
  options_.max_bytes = 3 * kExecBytes;
  make();
  for (int round = 0; round < 5; ++round) {
    for (int layer = 1; layer <= 4; ++layer)
      EXPECT_EQ(get(layer), layer <= 3) << "round " << round;
  }
  const GraphReport report = cache_->report();
  EXPECT_EQ(report.num_captured, 3u);
  EXPECT_EQ(report.num_evicted, 0u);
  EXPECT_EQ(report.num_no_room, 5u);
  EXPECT_LE(report.bytes, options_.max_bytes);
  EXPECT_LE(recorded_.size(), 4u) << "what finds no room is not captured again and again";
}

TEST_F(GraphCacheTest, executable_larger_than_the_budget_is_not_kept) {
  options_.max_bytes = kExecBytes / 2;
  make();
  EXPECT_FALSE(get(1));
  EXPECT_FALSE(get(1));
  EXPECT_EQ(fake_cudart::live().execs, 0);
  EXPECT_EQ(recorded_.size(), 1u);
}

TEST_F(GraphCacheTest, memory_that_another_process_takes_is_no_graphs) {
  make();
  fake_cudart::take_during_next_exec(size_t{8} << 30);
  EXPECT_TRUE(get(1));
  EXPECT_TRUE(get(1));
  EXPECT_LT(cache_->report().bytes, size_t{8} << 20);
}

TEST_F(GraphCacheTest, warming_captures_the_largest_bucket_first_and_stops_at_the_budget) {
  options_.eager_launches = 1;
  options_.max_executables = 2;
  make();
  std::vector<GraphCache::Request> requests;
  for (const int32_t bucket : {4, 64, 16})
    requests.push_back({.key = key(0, bucket), .record = record(bucket), .context = {}});
  const GraphReport report = cache_->warm(requests);
  EXPECT_EQ(report.num_executables, 2u);
  EXPECT_EQ(recorded_, (std::vector{64, 64, 16, 16, 4})) << "once eagerly, once in capture";
  EXPECT_NE(cache_->get(key(0, 64), record(64), {}), nullptr);
  EXPECT_NE(cache_->get(key(0, 16), record(16), {}), nullptr);
  EXPECT_EQ(cache_->get(key(0, 4), record(4), {}), nullptr);
}

// The kernel named here is refused inside the capture.
TEST_F(GraphCacheTest, each_way_a_capture_fails_leaves_the_segment_eager_for_good) {
  for (const char* call : {"cudaStreamBeginCapture", "cudaLaunchKernel", "cudaStreamEndCapture",
                           "cudaGraphInstantiate", "cudaGraphUpload", "cudaGraphGetNodes"}) {
    make();
    fake_cudart::fail_call_of(call, 1, cudaErrorMemoryAllocation);
    EXPECT_FALSE(get(1)) << call;
    EXPECT_FALSE(get(1)) << call;
    EXPECT_TRUE(get(2)) << call << ": the next capture is not disturbed";
    const GraphReport report = cache_->report();
    EXPECT_EQ(report.num_failed, 1u);
    EXPECT_NE(report.last_failure.find(call), std::string::npos) << report.last_failure;
    EXPECT_NE(report.last_failure.find("operator 'qkv' of layer 1"), std::string::npos)
        << report.last_failure;
  }
}

TEST_F(GraphCacheTest, failure_can_be_wanted_to_be_an_error) {
  options_.on_failure = CaptureFailure::kThrow;
  make();
  fake_cudart::fail_call_of("cudaGraphInstantiate", 1, cudaErrorInvalidValue);
  EXPECT_THROW(get(1), CudaError);
  EXPECT_FALSE(get(1));
}

TEST_F(GraphCacheTest, record_that_breaks_the_capture_is_a_failure) {
  make();
  const auto record = [](cudaStream_t stream) { ignore(cudaStreamSynchronize(stream)); };
  EXPECT_EQ(cache_->get(key(1), record, {}), nullptr);
  EXPECT_NE(cache_->report().last_failure.find("Invalidated"), std::string::npos);
  EXPECT_TRUE(get(2));
}

}  // namespace
}  // namespace flowprefill::testing
