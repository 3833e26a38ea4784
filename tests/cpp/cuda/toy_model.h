// ToyModel: a small "model" whose kernels are host functions, as CudaPlans; its results depend on
// every byte that must survive a boundary. Used by the tests of csrc/devices/cuda.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "devices/cuda/runtime/cuda_plan.h"
#include "fake_cudart.h"

namespace flowprefill::testing {

inline constexpr size_t kRows = 8;
inline constexpr int32_t kBucket = 8;
inline constexpr size_t kLaneBytes = 256;
inline constexpr size_t kInputBytes = kRows * sizeof(uint32_t);
inline constexpr size_t kScratchBytes = 64;
inline constexpr int64_t kKernelNs = 1000;

// The lane's activations. A gap before each, so that ranges do not join.
inline constexpr LiveRange kHidden{16, kRows * 4};    // residual stream: from embed to the end
inline constexpr LiveRange kQkv{64, 2 * kRows * 4};   // from qkv to attention
inline constexpr LiveRange kContext{160, kRows * 4};  // from attention to the output projection
inline constexpr LiveRange kWholeLane{0, kLaneBytes};

// Segments: embed, then for each layer qkv, attention, output. inputs[0] is the run's id: kernels
// read it on the device, so their log shows for which run they really ran.
class ToyModel {
 public:
  using Step = std::pair<uint32_t, size_t>;  // run id, segment

  explicit ToyModel(int layers) : layers_(layers) {}

  size_t num_segments() const { return 1 + 3 * static_cast<size_t>(layers_); }

  // bucket 0: eager. attention is never captured, as in a plan for real kernels that cannot be.
  std::shared_ptr<const CudaPlan> plan(int32_t bucket = kBucket, bool with_eager_attention = true) {
    std::vector<CudaSegment> segments;
    segments.push_back({.label = label("embed", -1),
                        .shape = {},
                        .access = {.reads = {}, .writes = LiveSet({kWholeLane})},
                        .launch = [this](const LaunchArgs& args) { embed(args); }});
    for (int layer = 0; layer < layers_; ++layer) {
      const size_t first = segments.size();
      segments.push_back({.label = label("qkv_proj", layer),
                          .shape = shape(1, layer),
                          .access = {.reads = LiveSet({kHidden}), .writes = LiveSet({kQkv})},
                          .launch = [this, layer, first](const LaunchArgs& args) {
                            qkv(args, static_cast<uint32_t>(layer), first);
                          }});
      segments.push_back(
          {.label = label("attention", layer),
           .shape = shape(2, layer),
           .access = {.reads = LiveSet({kQkv}), .writes = LiveSet({kContext})},
           .is_capturable = !with_eager_attention,
           .launch = [this, first](const LaunchArgs& args) { attention(args, first + 1); }});
      segments.push_back(
          {.label = label("o_proj", layer),
           .shape = shape(3, layer),
           .access = {.reads = LiveSet({kHidden, kContext}), .writes = LiveSet({kHidden})},
           .launch = [this, first](const LaunchArgs& args) { output(args, first + 2); }});
    }
    return std::make_shared<const CudaPlan>(bucket, std::move(segments), kHidden);
  }

  static std::vector<std::byte> inputs(uint32_t run_id) {
    std::vector<std::byte> bytes(kInputBytes);
    for (uint32_t i = 0; i < kRows; ++i) {
      const uint32_t value = i == 0 ? run_id : run_id * 77 + i;
      std::memcpy(bytes.data() + i * 4, &value, 4);
    }
    return bytes;
  }

  // What a run with these inputs must result in.
  std::array<uint32_t, kRows> expected(uint32_t run_id) const {
    std::array<uint32_t, kRows> in{};
    std::memcpy(in.data(), inputs(run_id).data(), kInputBytes);
    std::array<uint32_t, kRows> hidden{};
    for (size_t i = 0; i < kRows; ++i)
      hidden[i] = embed_one(in[i]);
    for (int layer = 0; layer < layers_; ++layer) {
      std::array<uint32_t, 2 * kRows> qkv{};
      for (size_t j = 0; j < 2 * kRows; ++j)
        qkv[j] = qkv_one(hidden[j % kRows], static_cast<uint32_t>(layer), j);
      for (size_t i = 0; i < kRows; ++i)
        hidden[i] = output_one(hidden[i], qkv[i] + qkv[i + kRows] * in[1]);
    }
    return hidden;
  }

  // Called by the last kernel of each segment, on the stream's thread.
  std::function<void(uint32_t run_id, size_t segment)> on_segment;
  // Called when a segment is launched or captured, on the executor's thread; may throw.
  std::function<void(size_t segment)> on_launch;

  std::vector<Step> steps() {
    const std::lock_guard lock(mutex_);
    return steps_;
  }

 private:
  static SegmentLabel label(const char* op, int32_t layer) {
    return {.op = op, .layer = layer, .last_layer = layer, .row_begin = 0, .row_end = kRows};
  }
  static SegmentShape shape(int32_t op, int32_t layer) {
    return {.first_op = 10 * layer + op, .last_op = 10 * layer + op};
  }
  static uint32_t* words(std::byte* base, size_t offset) {
    return reinterpret_cast<uint32_t*>(base + offset);
  }
  static uint32_t embed_one(uint32_t in) { return in * 2654435761u + 1; }
  static uint32_t qkv_one(uint32_t hidden, uint32_t layer, size_t j) {
    return hidden * (2 * layer + 3) ^ static_cast<uint32_t>(j);
  }
  static uint32_t output_one(uint32_t hidden, uint32_t context) {
    return (hidden << 5 | hidden >> 27) + context;
  }

  void note_launch(size_t segment) const {
    if (on_launch)
      on_launch(segment);
  }

  // A kernel that ends the segment with the log.
  void launch_last(const LaunchArgs& args, size_t segment, std::function<void()> work) {
    check(fake_cudart::launch_kernel(
              args.stream,
              [this, inputs = args.inputs, segment, work = std::move(work)] {
                work();
                const uint32_t run_id = *words(inputs, 0);
                {
                  const std::lock_guard lock(mutex_);
                  steps_.emplace_back(run_id, segment);
                }
                if (on_segment)
                  on_segment(run_id, segment);
              },
              kKernelNs),
          "cudaLaunchKernel");
  }

  // Overwrites the whole lane: activations of another run must have been saved before.
  void embed(const LaunchArgs& args) {
    note_launch(0);
    launch_last(args, 0, [lane = args.activations, in = args.inputs] {
      const uint32_t fill = *words(in, 0) * 0x01010101u;
      for (size_t i = 0; i < kLaneBytes / 4; ++i)
        words(lane, 0)[i] = fill;
      for (size_t i = 0; i < kRows; ++i)
        words(lane, kHidden.offset)[i] = embed_one(words(in, 0)[i]);
    });
  }

  // Two kernels, the first's result in scratch.
  void qkv(const LaunchArgs& args, uint32_t layer, size_t segment) {
    note_launch(segment);
    check(fake_cudart::launch_kernel(
              args.stream,
              [lane = args.activations, scratch = args.scratch, layer] {
                for (size_t j = 0; j < 2 * kRows; ++j)
                  words(scratch, 0)[j] = qkv_one(words(lane, kHidden.offset)[j % kRows], layer, j);
              },
              kKernelNs),
          "cudaLaunchKernel");
    launch_last(args, segment, [lane = args.activations, scratch = args.scratch] {
      std::memcpy(words(lane, kQkv.offset), scratch, kQkv.bytes);
      std::memset(scratch, 0x5a, kQkv.bytes);
    });
  }

  // Takes a factor from the host's inputs if it is launched eagerly, else from the device's.
  void attention(const LaunchArgs& args, size_t segment) {
    note_launch(segment);
    uint32_t factor = 0;
    const bool has_factor = !args.host_inputs.empty();
    if (has_factor)
      std::memcpy(&factor, args.host_inputs.data() + 4, 4);
    launch_last(args, segment, [lane = args.activations, in = args.inputs, factor, has_factor] {
      const uint32_t f = has_factor ? factor : words(in, 0)[1];
      const uint32_t* qkv = words(lane, kQkv.offset);
      for (size_t i = 0; i < kRows; ++i)
        words(lane, kContext.offset)[i] = qkv[i] + qkv[i + kRows] * f;
      std::memset(words(lane, kQkv.offset), 0x77, kQkv.bytes);
    });
  }

  void output(const LaunchArgs& args, size_t segment) {
    note_launch(segment);
    launch_last(args, segment, [lane = args.activations] {
      for (size_t i = 0; i < kRows; ++i) {
        uint32_t& hidden = words(lane, kHidden.offset)[i];
        hidden = output_one(hidden, words(lane, kContext.offset)[i]);
      }
      std::memset(words(lane, kContext.offset), 0x99, kContext.bytes);
    });
  }

  const int layers_;
  std::mutex mutex_;
  std::vector<Step> steps_;
};

}  // namespace flowprefill::testing
