#include "host_kernels.h"

#include <functional>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "devices/cuda/kernels/kernels.h"
#include "fake_cudart.h"
#include "plain_kernels.h"
#ifdef FP_SIMT
#include "../kernels/attention_on_host.h"
#include "devices/cuda/kernels/fp8_bodies.h"
#include "devices/cuda/kernels/rope_body.h"
#include "devices/cuda/kernels/row_bodies.h"
#include "devices/cuda/kernels/row_grid.h"
#include "devices/cuda/kernels/sample_body.h"
#include "devices/cuda/kernels/score_body.h"
#endif

namespace fake_kernels {
namespace {

struct Log {
  std::mutex mutex;
  std::vector<std::string> names;
  bool is_with_bodies = false;
};

Log& log() {
  static Log instance;
  return instance;
}

cudaError_t launch(const char* name, cudaStream_t stream, std::function<void()> work) {
  return fake_cudart::launch_kernel(stream, [name, work = std::move(work)] {
    work();
    const std::lock_guard lock(log().mutex);
    log().names.emplace_back(name);
  });
}

}  // namespace

bool has_bodies() {
#ifdef FP_SIMT
  return true;
#else
  return false;
#endif
}

void use_bodies(bool is_wanted) {
  if (is_wanted && !has_bodies())
    throw std::logic_error("use_bodies: built without FP_SIMT");
  const std::lock_guard lock(log().mutex);
  log().is_with_bodies = is_wanted;
}

std::vector<std::string> ran() {
  const std::lock_guard lock(log().mutex);
  return log().names;
}

void reset() {
  const std::lock_guard lock(log().mutex);
  log().names.clear();
}

}  // namespace fake_kernels

namespace flowprefill {
namespace {

using fake_kernels::launch;

#ifdef FP_SIMT
bool with_bodies() {
  const std::lock_guard lock(fake_kernels::log().mutex);
  return fake_kernels::log().is_with_bodies;
}

// As the launches of the kernels have them: a block a row, or blocks of columns.
simt::Grid blocks_of(int32_t rows, int32_t threads, size_t shared_bytes = 0) {
  return {.x = rows, .threads = threads, .shared_bytes = shared_bytes};
}
simt::Grid columns_of(int32_t rows, int32_t width, int32_t per_thread = kColumnsPerThread) {
  return {.x = rows, .y = column_parts(width, per_thread), .threads = kColumnThreads};
}

// The kernel's own body on simt, or the plain loop.
template <typename Plain, typename Body>
std::function<void()> kernel(const simt::Grid& grid, Plain plain, Body body) {
  if (!with_bodies())
    return plain;
  return [grid, body] { simt::launch(grid, body); };
}

#define FP_KERNEL(grid, plain, call) \
  kernel(                            \
      grid, [args] { plain; }, [args](const simt::Thread& t) { call; })
#else
#define FP_KERNEL(grid, plain, call) [args] { plain; }
#endif

}  // namespace

cudaError_t launch_embed(const EmbedArgs& args, cudaStream_t stream) {
  check(args);
  return launch(
      "embed", stream,
      FP_KERNEL(columns_of(args.rows, args.width), fake_kernels::embed(args), embed_body(t, args)));
}

cudaError_t launch_rotary(const RotaryArgs& args, cudaStream_t stream) {
  check(args);
  return launch(
      "rotary", stream,
      FP_KERNEL(blocks_of(args.rows, 128), fake_kernels::rotary(args), rotary_body(t, args)));
}

template <typename Out>
cudaError_t launch_rms_norm(const RmsNormArgs<Out>& args, cudaStream_t stream) {
  check(args);
  return launch("rms_norm", stream,
                FP_KERNEL(blocks_of(args.rows, 256, 32), fake_kernels::rms_norm(args),
                          rms_norm_body(t, args)));
}

cudaError_t launch_residual(const ResidualArgs& args, cudaStream_t stream) {
  check(args);
  return launch("residual", stream,
                FP_KERNEL(blocks_of(args.rows, 256, 32), fake_kernels::residual(args),
                          residual_body(t, args)));
}

cudaError_t launch_round(const RoundArgs& args, cudaStream_t stream) {
  check(args);
  return launch(
      "round", stream,
      FP_KERNEL(columns_of(args.rows, args.width), fake_kernels::round(args), round_body(t, args)));
}

cudaError_t launch_softcap(const SoftcapArgs& args, cudaStream_t stream) {
  check(args);
  return launch("softcap", stream,
                FP_KERNEL(columns_of(args.rows, args.width, 4), fake_kernels::softcap(args),
                          softcap_body(t, args)));
}

template <typename In>
cudaError_t launch_rope(const RopeArgs<In>& args, cudaStream_t stream) {
  check(args);
  [[maybe_unused]] const int32_t heads = args.heads + 2 * args.kv_heads;
  return launch("rope", stream,
                FP_KERNEL((simt::Grid{.x = args.rows,
                                      .y = args.norms_rows ? kRopeRowParts : (heads + 3) / 4,
                                      .threads = 128,
                                      .shared_bytes = 16}),
                          fake_kernels::rope(args),
                          (args.norms_rows ? rope_rows_body(t, args) : rope_body(t, args))));
}

template <typename In>
cudaError_t launch_gate(const GateArgs<In>& args, cudaStream_t stream) {
  check(args);
  return launch(
      "gate", stream,
      FP_KERNEL(columns_of(args.rows, args.width), fake_kernels::gate(args), gate_body(t, args)));
}

cudaError_t launch_quantise(const QuantiseArgs& args, cudaStream_t stream) {
  check(args);
  return launch("quantise", stream,
                FP_KERNEL(blocks_of(args.rows, 256, 32), fake_kernels::quantise(args),
                          quantise_body(t, args)));
}

cudaError_t launch_widen(const WidenArgs& args, cudaStream_t stream) {
  check(args);
  return launch("widen", stream,
                FP_KERNEL(columns_of(args.rows, args.width), fake_kernels::widen_codes(args),
                          widen_body(t, args)));
}

cudaError_t launch_rescale(const RescaleArgs& args, cudaStream_t stream) {
  check(args);
  return launch("rescale", stream,
                FP_KERNEL(columns_of(args.rows, args.width()), fake_kernels::rescale(args),
                          rescale_body(t, args)));
}

cudaError_t launch_sample(const SampleArgs& args, cudaStream_t stream) {
  check(args);
  return launch(
      "sample", stream,
      FP_KERNEL(blocks_of(args.rows, 1024, static_cast<size_t>(sample_shared_bytes(1024))),
                fake_kernels::sample(args), sample_body(t, args)));
}

cudaError_t launch_score(const ScoreArgs& args, cudaStream_t stream) {
  check(args);
  return launch("score", stream,
                FP_KERNEL(blocks_of(args.rows, 1024, static_cast<size_t>(score_shared_bytes(1024))),
                          fake_kernels::score(args), score_body(t, args)));
}

cudaError_t launch_pool(const PoolArgs& args, cudaStream_t stream) {
  check(args);
  return launch("pool", stream,
                FP_KERNEL((simt::Grid{.x = (args.width + 63) / 64, .threads = 64}),
                          fake_kernels::pool(args), pool_body(t, args)));
}

// Where keys are split, what merges the chunks is a kernel of its own. The plain loop splits none.
cudaError_t launch_attention(const AttentionArgs& args, cudaStream_t stream) {
  check(args);
  std::function<void()> tiles = [args] { fake_kernels::attention(args); };
  std::function<void()> merges = [] {};
#ifdef FP_SIMT
  if (with_bodies()) {
    tiles = [args] { simt::run_attention_tiles(args); };
    merges = [args] { simt::run_attention_merges(args); };
  }
#endif
  const cudaError_t code = launch("attention", stream, std::move(tiles));
  if (code != cudaSuccess || args.num_merges == 0)
    return code;
  return launch("attention_merge", stream, std::move(merges));
}

cudaError_t launch_attention_hopper(const AttentionArgs& args, cudaStream_t stream) {
  check_rows(args);
  std::function<void()> tiles = [args] { fake_kernels::attention_of_rows(args); };
  std::function<void()> merges = [] {};
#ifdef FP_SIMT
  if (with_bodies()) {
    tiles = [args] { simt::run_attention_rows(args); };
    merges = [args] { simt::run_attention_row_merges(args); };
  }
#endif
  const cudaError_t code = launch("attention_hopper", stream, std::move(tiles));
  if (code != cudaSuccess || args.num_merges == 0)
    return code;
  return launch("attention_merge", stream, std::move(merges));
}

bool has_hopper_attention() {
  return true;
}

// Every tile computes the same here.
cudaError_t launch_gemm(const GemmArgs& args, GemmTile tile, cudaStream_t stream) {
  check_tile(args, tile);
  return launch("gemm", stream, [args] { fake_kernels::gemm(args); });
}

namespace {

struct Range {
  const void* begin;
  const void* end;
};

template <typename T>
Range rows_at(const T* first, int32_t rows, int64_t stride, int32_t width) {
  return {first, first + (rows - 1) * stride + width};
}

// On a device some blocks have written already when others still read.
bool writes_what_it_reads(const FusedProduct& args) {
  const GemmArgs& product = args.product;
  const int32_t rows = product.rows();
  const Range read = args.has_norm()
                         ? rows_at(args.norm.hidden, rows, args.norm.ld_hidden, product.depth)
                         : rows_at(product.first_a(), rows, product.lda, product.depth);
  const Range written =
      args.has_rope()
          ? rows_at(args.rope.q, rows, args.rope.ld_q, args.rope.heads * args.rope.head_dim)
      : product.output == GemmOutput::kFloat
          ? rows_at(product.first_d<float>(), rows, product.ldd, product.d_columns())
          : rows_at(product.first_d<Bf16>(), rows, product.ldd, product.d_columns());
  return read.begin < written.end && written.begin < read.end;
}

}  // namespace

// One kernel on a device: what it leaves unwritten there is not written here either.
cudaError_t launch_fused(const FusedProduct& args, cudaStream_t stream) {
  check(args);
  if (writes_what_it_reads(args))
    throw std::logic_error("fused: writes where other blocks may read still");
  return launch("fused", stream, [args] { fake_kernels::fused(args); });
}

template cudaError_t launch_rms_norm<float>(const RmsNormArgs<float>&, cudaStream_t);
template cudaError_t launch_rms_norm<Bf16>(const RmsNormArgs<Bf16>&, cudaStream_t);
template cudaError_t launch_rope<float>(const RopeArgs<float>&, cudaStream_t);
template cudaError_t launch_rope<Bf16>(const RopeArgs<Bf16>&, cudaStream_t);
template cudaError_t launch_gate<float>(const GateArgs<float>&, cudaStream_t);
template cudaError_t launch_gate<Bf16>(const GateArgs<Bf16>&, cudaStream_t);

}  // namespace flowprefill
