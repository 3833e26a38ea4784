// Section "attention": causal attention over the paged cache, prefill and decode.
#include <algorithm>

#include "devices/cuda/kernels/attention_split.h"
#include "kernel_bench.h"

namespace flowprefill {
namespace {

struct Case {
  const char* name;
  int sequences, context, rows;  // rows of each sequence, on so many tokens in the cache
  int block_shift = kBlockShift;
};
constexpr Case kCases[] = {{"prefill 2k", 1, 0, 2048},
                           {"prefill 8k", 1, 0, 8192},
                           {"prefill 32k", 1, 0, 32768},
                           {"1024 rows on 7k", 1, 7168, 1024},
                           {"1024 rows on 31k", 1, 31744, 1024},
                           {"256 rows on 8k", 1, 8192, 256},
                           {"prefill 8k, blocks of 16", 1, 0, 8192, 4},
                           {"prefill 8k, blocks of 128", 1, 0, 8192, 7},
                           {"64 rows on 32k", 1, 32704, 64},
                           {"8 x 1k prefill", 8, 0, 1024},
                           {"decode 1 on 2k", 1, 2047, 1},
                           {"decode 1 on 32k", 1, 32767, 1},
                           {"decode 32 on 2k", 32, 2047, 1},
                           {"decode 64 on 8k", 64, 8191, 1}};

// chunk_keys: 0: the keys are not split.
std::vector<AttentionSlice> slices_of(const Case& one, int32_t chunk_keys) {
  const AttentionSplit split{multiprocessors(), kHeads / kKv, kKv};
  std::vector<AttentionSlice> slices;
  for (int i = 0; i < one.sequences; ++i) {
    slices.push_back({.row = i * one.rows,
                      .rows = one.rows,
                      .position = one.context,
                      .sequence = i,
                      .chunk_keys = chunk_keys,
                      .is_decode = split.is_decode(one.rows)});
  }
  return slices;
}

void tell(const Case& one, const char* how, double us) {
  const double rows = one.rows, length = one.context + rows;
  const double pairs = one.sequences * (rows * one.context + rows * (rows + 1) / 2);
  const double kv_bytes = one.sequences * length * kKv * kDim * 4;
  say("attention", std::string(one.name) + how,
      text("%.1f us\t%.1f TFLOP/s\t%.0f GB/s of KV read once", us,
           pairs * 4 * kHeads * kDim / us / 1e6, kv_bytes / us / 1e3));
}

void bench_tiles(const Case& one, const char* how, const std::vector<AttentionSlice>& slices,
                 AttentionArgs args, cudaStream_t stream) {
  constexpr int kGroup = kHeads / kKv;
  const std::vector<AttentionTile> tiles = attention_tiles(slices, kGroup);
  const std::vector<AttentionTile> merges = attention_merges(tiles);
  int64_t rows = 0;
  for (const AttentionSlice& slice : slices)
    rows += partial_rows_of(slice, kGroup);
  const DeviceBuffer tile_list = on_device(tiles), merge_list = on_device(merges);
  const DeviceBuffer partials(attention_partial_bytes(rows, kKv, kDim));
  const int units = multiprocessors() * AttentionSplit::kBlocksPerUnit;
  args.tiles = as<const AttentionTile>(tile_list);
  args.num_tiles = static_cast<int32_t>(tiles.size());
  args.merges = as<const AttentionTile>(merge_list);
  args.num_merges = static_cast<int32_t>(merges.size());
  args.num_blocks = std::min(args.num_tiles, std::max(one.sequences, (units + kKv - 1) / kKv));
  args.partials = as<float>(partials);
  args.partial_rows = static_cast<int32_t>(rows);
  tell(one, how, device_us([&](cudaStream_t s) { FP_CUDA(launch_attention(args, s)); }, stream, 5));
}

// Hopper's kernel on the same operands, after the portable one: args.out has that one's output.
void bench_hopper(const Case& one, AttentionArgs args, cudaStream_t stream) {
  const std::vector<AttentionTile> tiles = attention_row_tiles(slices_of(one, 0), kDim);
  const DeviceBuffer tile_list = on_device(tiles);
  args.tiles = as<const AttentionTile>(tile_list);
  args.num_tiles = static_cast<int32_t>(tiles.size());
  args.rows = one.sequences * one.rows;
  const size_t elements = size_t(args.rows) * kHeads * kDim;
  const std::vector<Bf16> portable = output_of(args, elements);
  FP_CUDA(cudaMemset(args.out, 0xff, elements * sizeof(Bf16)));  // NaN: what it leaves out shows
  FP_CUDA(cudaDeviceSynchronize());
  const cudaError_t code = launch_attention_hopper(args, stream);
  if (code != cudaSuccess) {
    say("attention", std::string(one.name) + ", hopper", cudaGetErrorString(code));
    static_cast<void>(cudaGetLastError());
    return;
  }
  tell_difference("attention", std::string(one.name) + ", hopper's output", portable,
                  output_of(args, elements));
  tell(one, ", hopper",
       device_us([&](cudaStream_t s) { FP_CUDA(launch_attention_hopper(args, s)); }, stream, 5));
}

void bench_case(const Case& one, cudaStream_t stream) {
  const int block_tokens = 1 << one.block_shift;
  const int blocks = (one.context + one.rows + block_tokens - 1) / block_tokens;
  const size_t all_blocks = size_t(blocks) * size_t(one.sequences);
  const int64_t half = int64_t{kKv} * block_tokens * kDim;
  const DeviceBuffer cache = random_halves(all_blocks * 2 * static_cast<size_t>(half), 1, 7);
  const size_t q_elements = size_t(one.sequences) * size_t(one.rows) * kHeads * kDim;
  const DeviceBuffer q = random_halves(q_elements, 0.13f, 8), out(q.bytes());
  const DeviceBuffer tables = on_device(shuffled_blocks(blocks * one.sequences));
  AttentionArgs args{.q = halves(q),
                     .ld_q = kHeads * kDim,
                     .out = halves(out),
                     .ld_out = kHeads * kDim,
                     .cache = cache_of(cache, one.block_shift),
                     .block_tables = as<const int32_t>(tables),
                     .block_table_stride = blocks,
                     .heads = kHeads,
                     .kv_heads = kKv,
                     .kv_end = kKv,
                     .head_dim = kDim};
  const AttentionSplit split{multiprocessors(), kHeads / kKv, kKv};
  bench_tiles(one, "", slices_of(one, 0), args, stream);
  if (one.rows >= 128 && has_hopper_attention())
    bench_hopper(one, args, stream);
  if (const int32_t chunk_keys = split.chunk_keys(one.rows, one.context + one.rows))
    bench_tiles(one, ", keys split", slices_of(one, chunk_keys), args, stream);
}

}  // namespace

void bench_attention(cudaStream_t stream) {
  for (const Case& one : kCases)
    bench_case(one, stream);
}

}  // namespace flowprefill
