// Products of few rows with norm and rope fused, on the device: as plain loops, and with the bits
// of the three kernels one after another.
#include "device_test.h"
#include "fused_layer.h"

namespace flowprefill::testing {
namespace {

template <typename T>
using Pointer = Array<T>*;

class Fused : public DeviceTest {
 protected:
  void test(const FusedShape& shape) {
    forget();
    const auto operands = add_operands<Pointer>(
        shape, [&](const char* name, auto values) { return &add(name, std::move(values)); });
    // Sums round differently: by a share of the terms, which may cancel.
    for (Array<Bf16>* out : {operands.d, operands.q, operands.keys, operands.values})
      out->allow(2 * kOneStep, 0.05);
    const auto args = [&](Place place) {
      return FusedArgs(shape, operands, [place](auto* array) { return array->at(place); });
    };
    const FusedProduct fused = args(Place::kDevice).fused();
    const auto launch = [&](cudaStream_t stream) { return launch_fused(fused, stream); };
    expect_kernel(launch, [&] { fake_kernels::fused(args(Place::kHost).fused()); });
#ifndef FP_GPU_DOUBLE  // its loops are not those kernels
    const auto one = run(launch);
    const auto three = run([&](cudaStream_t stream) {
      args(Place::kDevice)
          .one_after_another(
              [&](const auto& norm) { FP_CUDA(launch_rms_norm(norm, stream)); },
              [&](const auto& p) { FP_CUDA(launch_gemm(p, GemmTile::kFewRows, stream)); },
              [&](const auto& rope) { FP_CUDA(launch_rope(rope, stream)); });
      return cudaSuccess;
    });
    // Operands that only one of both writes hold NaNs in the other.
    constexpr size_t kNormed = 9;  // in the order of FusedOperands
    constexpr size_t kD = 10;
    for (size_t i = 0; i < one.size(); ++i) {
      if (i == kNormed || (i == kD && shape.ropes))
        continue;
      EXPECT_TRUE(one[i] == three[i]) << "operand " << i;
    }
#endif
  }
};

TEST_F(Fused, NormsAndTurnsInEveryHeadSize) {
  for (const int32_t head_dim : {64, 96, 128, 256}) {
    for (const bool has_bias : {false, true})
      test({.depth = 1032, .head_dim = head_dim, .has_bias = has_bias});
  }
}
TEST_F(Fused, NormsBeforeAGate) {
  for (const int32_t rows : {1, 2})
    test({.rows = rows, .depth = 4096, .ropes = false, .is_gated = true});
}
TEST_F(Fused, TurnsUpToEightRows) {
  for (const int32_t rows : {1, 5, 8})
    test({.rows = rows, .depth = 1032, .head_dim = 128, .norms = false});
}

}  // namespace
}  // namespace flowprefill::testing
