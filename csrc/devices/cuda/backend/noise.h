// fill_with_noise(): bytes to measure kernels on. Called by CudaBackend before it measures
// products.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <span>

namespace flowprefill {

// Fills device memory with bf16 numbers in (-1, 1), the same each time; read as floats they are
// finite too. What is measured on zeros is faster than what comes: they switch no wires. Waits for
// `stream`. Throws CudaError.
void fill_with_noise(std::span<std::byte> memory, cudaStream_t stream);

}  // namespace flowprefill
