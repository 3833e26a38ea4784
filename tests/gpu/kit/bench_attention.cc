// Section "attention": causal attention over the paged cache, prefill and decode.
#include <algorithm>
#include <numeric>
#include <random>

#include "kernel_bench.h"

namespace flowprefill {
namespace {

struct Case {
  const char* name;
  int sequences, context, rows;  // rows of each sequence, on so many tokens in the cache
};
constexpr Case kCases[] = {{"prefill 2k", 1, 0, 2048},           {"prefill 8k", 1, 0, 8192},
                           {"prefill 32k", 1, 0, 32768},         {"1024 rows on 7k", 1, 7168, 1024},
                           {"1024 rows on 31k", 1, 31744, 1024}, {"256 rows on 8k", 1, 8192, 256},
                           {"64 rows on 32k", 1, 32704, 64},     {"8 x 1k prefill", 8, 0, 1024},
                           {"decode 1 on 2k", 1, 2047, 1},       {"decode 1 on 32k", 1, 32767, 1},
                           {"decode 32 on 2k", 32, 2047, 1},     {"decode 64 on 8k", 64, 8191, 1}};

std::vector<AttentionTile> tiles_of(const Case& one) {
  std::vector<AttentionSlice> slices;
  for (int i = 0; i < one.sequences; ++i)
    slices.push_back(
        {.row = i * one.rows, .rows = one.rows, .position = one.context, .sequence = i});
  return attention_tiles(slices, kHeads / kKv);
}

// Blocks of the cache in no order, as a server has them after a while.
std::vector<int32_t> shuffled_blocks(int count) {
  std::vector<int32_t> out(static_cast<size_t>(count));
  std::iota(out.begin(), out.end(), 0);
  std::shuffle(out.begin(), out.end(), std::mt19937(5));
  return out;
}

void tell(const Case& one, double us) {
  const double rows = one.rows, length = one.context + rows;
  const double pairs = one.sequences * (rows * one.context + rows * (rows + 1) / 2);
  const double kv_bytes = one.sequences * length * kKv * kDim * 4;
  say("attention", one.name,
      text("%.1f us\t%.1f TFLOP/s\t%.0f GB/s of KV read once", us,
           pairs * 4 * kHeads * kDim / us / 1e6, kv_bytes / us / 1e3));
}

void bench_case(const Case& one, cudaStream_t stream) {
  const int blocks = (one.context + one.rows + kBlockTokens - 1) / kBlockTokens;
  const size_t all_blocks = size_t(blocks) * size_t(one.sequences);
  const int64_t half = int64_t{kKv} * kBlockTokens * kDim;
  const DeviceBuffer cache = random_halves(all_blocks * 2 * static_cast<size_t>(half), 1, 7);
  const size_t q_elements = size_t(one.sequences) * size_t(one.rows) * kHeads * kDim;
  const DeviceBuffer q = random_halves(q_elements, 0.13f, 8), out(q.bytes());
  const DeviceBuffer tables = on_device(shuffled_blocks(blocks * one.sequences));
  const std::vector<AttentionTile> tiles = tiles_of(one);
  const DeviceBuffer tile_list = on_device(tiles);
  const AttentionArgs args{
      .q = halves(q),
      .ld_q = kHeads * kDim,
      .out = halves(out),
      .ld_out = kHeads * kDim,
      .cache = {halves(cache), halves(cache) + half, 2 * half, kDim, kBlockTokens * kDim, 4},
      .block_tables = as<const int32_t>(tables),
      .block_table_stride = blocks,
      .tiles = as<const AttentionTile>(tile_list),
      .num_tiles = static_cast<int32_t>(tiles.size()),
      .heads = kHeads,
      .kv_heads = kKv,
      .kv_end = kKv,
      .head_dim = kDim};
  tell(one, device_us([&](cudaStream_t s) { FP_CUDA(launch_attention(args, s)); }, stream, 5));
}

}  // namespace

void bench_attention(cudaStream_t stream) {
  for (const Case& one : kCases)
    bench_case(one, stream);
}

}  // namespace flowprefill
