// Links csrc/devices/cuda to the real CUDA runtime: every function it calls is there. Without a
// driver it must say so; with a GPU it runs a graph of one copy. Built where a toolkit with
// libcudart_static is found.
#include <cstdio>
#include <memory>
#include <vector>

#include "devices/cuda/runtime/cuda_device.h"
#include "devices/cuda/runtime/cuda_program.h"
#include "runtime/executor.h"

namespace {

using namespace flowprefill;  // NOLINT(google-build-using-namespace)

// One segment that copies the inputs into the lane; the result must be the inputs.
bool run_on_gpu() {
  constexpr size_t kBytes = 64;
  const CudaOptions options{.lanes = {.lane_bytes = kBytes, .input_bytes = kBytes}};
  const auto resources = std::make_shared<CudaResources>(options);
  std::vector<CudaSegment> segments;
  segments.push_back({.label = {.op = "copy"},
                      .access = {.writes = LiveSet({{0, kBytes}})},
                      .launch = [](const LaunchArgs& args) {
                        FP_CUDA(cudaMemcpyAsync(args.activations, args.inputs, kBytes,
                                                cudaMemcpyDeviceToDevice, args.stream));
                      }});
  const auto plan = std::make_shared<const CudaPlan>(1, std::move(segments), LiveRange{0, kBytes});
  Executor executor(std::make_unique<CudaDevice>(resources, CudaDeviceOptions{}));
  executor.start();
  for (uint64_t id = 1; id <= 3; ++id) {  // eager, captured, replayed
    const std::vector<std::byte> inputs(kBytes, std::byte{static_cast<uint8_t>(id)});
    auto program = std::make_unique<CudaProgram>(resources, plan, 1, inputs);
    const CudaProgram* result = program.get();
    const RunRef run = make_run(id, std::move(program));
    executor.dispatch(run);
    while (!is_terminal(run->state()))
      std::this_thread::yield();
    if (run->state() != RunState::kFinished ||
        !std::equal(inputs.begin(), inputs.end(), result->result().begin())) {
      std::printf("run %d is wrong: %s\n", static_cast<int>(id), run->error().c_str());
      return false;
    }
  }
  std::printf("ran on a GPU; %d graph replays\n",
              static_cast<int>(resources->graphs().report().num_replayed));
  return true;
}

}  // namespace

int main() {
  try {
    return run_on_gpu() ? 0 : 1;
  } catch (const CudaError& error) {
    std::printf("no GPU: %s\n", error.what());
    const bool is_absent =
        error.code() == cudaErrorInsufficientDriver || error.code() == cudaErrorNoDevice;
    return is_absent ? 0 : 1;
  }
}
