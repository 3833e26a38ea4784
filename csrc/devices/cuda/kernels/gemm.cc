// launch_gemm(): from the tile's name to its kernel. Declared in kernels.h.
#include "devices/cuda/kernels/gemm_kernels.h"
#include "devices/cuda/kernels/kernels.h"

namespace flowprefill {
namespace {

template <typename Output>
cudaError_t launch(const GemmArgs& args, GemmTile tile, cudaStream_t stream) {
  switch (tile) {
    case GemmTile::kFewRows:
      return gemm_few_rows(args, stream);
    case GemmTile::kAmpere64x64:
      return gemm_ampere_64x64<Output>(args, stream);
    case GemmTile::kAmpere128x128:
      return gemm_ampere_128x128<Output>(args, stream);
    case GemmTile::kAmpere256x128:
      return gemm_ampere_256x128<Output>(args, stream);
    case GemmTile::kHopper128x256:
      return gemm_hopper_128x256<Output>(args, stream);
  }
  return cudaErrorInvalidDeviceFunction;
}

cudaError_t launch_gated(const GemmArgs& args, GemmTile tile, cudaStream_t stream) {
  switch (tile) {
    case GemmTile::kFewRows:
      return gemm_few_rows(args, stream);
    case GemmTile::kAmpere64x64:
      return gemm_gated_ampere_64x64(args, stream);
    case GemmTile::kAmpere128x128:
      return gemm_gated_ampere_128x128(args, stream);
    case GemmTile::kAmpere256x128:
      return gemm_gated_ampere_256x128(args, stream);
    case GemmTile::kHopper128x256:
      break;  // gemm_tiles() does not name it
  }
  return cudaErrorInvalidDeviceFunction;
}

}  // namespace

cudaError_t launch_gemm(const GemmArgs& args, GemmTile tile, cudaStream_t stream) {
  check_tile(args, tile);
  if (args.is_gated)
    return launch_gated(args, tile, stream);
  return args.output == GemmOutput::kFloat ? launch<float>(args, tile, stream)
                                           : launch<Bf16>(args, tile, stream);
}

}  // namespace flowprefill
