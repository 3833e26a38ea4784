// GatedStore: store_gated() as the fusion callbacks of CUTLASS's visitor epilogue (mma.sync). Used
// by gemm_gated_sm80.cu on the device, and with CUTLASS's own iterators by a host test.
#pragma once

#include <cutlass/array.h>
#include <cutlass/gemm_coord.h>
#include <cute/tensor.hpp>

#include "devices/cuda/kernels/gemm_gate.h"

namespace flowprefill {

// ThreadMap: the epilogue's OutputTileThreadLayout; it knows which piece of a row a thread holds.
template <class ThreadMap>
class GatedStore {
 public:
  using Arguments = GatedOutput;
  using Params = GatedOutput;
  struct SharedStorage {};

  template <class ProblemShape>
  static Params to_underlying_arguments(const ProblemShape&, const Arguments& args, void*) {
    return args;
  }

  CUTLASS_HOST_DEVICE GatedStore(const Params& params, const SharedStorage&) : params_(&params) {}

  // What the epilogue calls per thread: begin and end of each stage, visit() per piece.
  template <class Coordinates>
  class Callbacks {
   public:
    CUTLASS_DEVICE Callbacks(const Params* params, const Coordinates& coordinates)
        : params_(params), coordinates_(coordinates) {}

    CUTLASS_DEVICE void begin_epilogue() {}
    CUTLASS_DEVICE void begin_step(int) {}
    CUTLASS_DEVICE void begin_row(int) {}
    CUTLASS_DEVICE void end_row(int) {}
    CUTLASS_DEVICE void end_step(int) {}
    CUTLASS_DEVICE void end_epilogue() {}

    template <int kCount>
    CUTLASS_DEVICE void visit(int step, int row, int column, int,
                              const cutlass::Array<float, kCount>& accumulators) {
      const auto at = coordinates_(cute::_0{}, column, row, step);
      float values[kCount];
      FP_UNROLL for (int i = 0; i < kCount; ++i) values[i] = accumulators[i];
      store_gated(*params_, cute::get<0>(at), cute::get<1>(at), values);
    }

   private:
    const Params* params_;
    Coordinates coordinates_;  // of the product, by piece
  };

  template <class ProblemShape>
  CUTLASS_DEVICE auto get_callbacks(const cutlass::gemm::GemmCoord& tile, int thread,
                                    const ProblemShape& shape) {
    const auto all = cute::make_identity_tensor(shape);
    // (element of a piece, piece of a row, row, step)
    const auto mine = cute::group_modes<3, 6>(ThreadMap::partition(all, thread, tile));
    return Callbacks<decltype(mine)>(params_, mine);
  }

 private:
  const Params* params_;
};

}  // namespace flowprefill
