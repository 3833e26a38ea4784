#include "devices/cuda/kernels/fused_product.h"

#include "devices/cuda/kernels/expect.h"

namespace flowprefill {
namespace {

constexpr int32_t kMostRows = 8;  // of the kernel's narrow form
constexpr int32_t kMostNormedRows = 2;
// What the rings of weights of two blocks leave of a multiprocessor's shared memory.
constexpr size_t kMostNormedBytes = size_t{32} << 10;
constexpr int32_t kRopeMultiple = 16;  // dimensions that a block takes at once: 8 pairs

}  // namespace

size_t normed_bytes(const GemmArgs& product) {
  const auto elements = static_cast<size_t>(product.rows()) * static_cast<size_t>(product.depth);
  return kNormSumsBytes + elements * sizeof(Bf16);
}

bool can_fuse(const GemmArgs& product) {
  return !product.is_fp8() && product.rows() <= kMostRows && !product.b_is_made;
}

bool can_fuse_norm(const GemmArgs& product) {
  return can_fuse(product) && product.rows() <= kMostNormedRows &&
         normed_bytes(product) <= kMostNormedBytes;
}

bool can_fuse_rope(const GemmArgs& product, const RopeArgs<Bf16>& rope) {
  return can_fuse(product) && product.output == GemmOutput::kBf16 && product.bias == nullptr &&
         product.scale == 1.0f && !product.adds_to_d && !product.is_gated &&
         rope.q_norm == nullptr && rope.k_norm == nullptr && rope.turning == rope.head_dim &&
         rope.head_dim % kRopeMultiple == 0 &&
         product.columns == (rope.heads + 2 * rope.kv_heads) * rope.head_dim;
}

void check(const FusedProduct& args) {
  GemmArgs product = args.product;
  if (args.has_norm()) {
    expect(can_fuse_norm(product), "rows", product.rows(),
           "at most 2 of bf16, that fit into 32 KiB, where they are normed");
    expect(args.norm.ld_hidden >= product.depth && args.norm.ld_hidden % 4 == 0, "ld_hidden",
           args.norm.ld_hidden, "a multiple of 4, at least depth");
    expect(args.norm.weight != nullptr, "weight", 0, "no null");
    expect_aligned("hidden", args.norm.hidden);
    expect_aligned("weight", args.norm.weight);
    product.a = product.b;  // there is none
    product.lda = product.ldb;
  }
  check_tile(product, GemmTile::kFewRows);
  expect(can_fuse(product), "rows", product.rows(), "at most 8 of bf16 weights");
  if (!args.has_rope())
    return;
  check(args.rope);
  expect(can_fuse_rope(product, args.rope), "head_dim", args.rope.head_dim,
         "a multiple of 16 that turns as a whole, without norms, behind a plain product of bf16");
  expect(args.rope.rows == product.rows(), "rope.rows", args.rope.rows, "the product's");
}

}  // namespace flowprefill
