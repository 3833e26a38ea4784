#include "devices/cuda/backend/noise.h"

#include <algorithm>
#include <random>
#include <vector>

#include "devices/cuda/kernels/portable.h"
#include "devices/cuda/runtime/cuda_error.h"

namespace flowprefill {
namespace {

constexpr size_t kNoiseNumbers = size_t{1} << 20;

}  // namespace

// A piece comes from the host and is doubled on the device.
void fill_with_noise(std::span<std::byte> memory, cudaStream_t stream) {
  if (memory.empty())
    return;
  std::minstd_rand random(1);
  std::uniform_real_distribution<float> number(-1.0f, 1.0f);
  std::vector<Bf16> piece(std::min(memory.size() / sizeof(Bf16), kNoiseNumbers));
  std::ranges::generate(piece, [&] { return to_bf16(number(random)); });
  size_t filled = piece.size() * sizeof(Bf16);
  FP_CUDA(cudaMemcpyAsync(memory.data(), piece.data(), filled, cudaMemcpyHostToDevice, stream));
  while (filled > 0 && filled < memory.size()) {
    const size_t bytes = std::min(filled, memory.size() - filled);
    FP_CUDA(cudaMemcpyAsync(memory.data() + filled, memory.data(), bytes, cudaMemcpyDeviceToDevice,
                            stream));
    filled += bytes;
  }
  FP_CUDA(cudaStreamSynchronize(stream));
}

}  // namespace flowprefill
