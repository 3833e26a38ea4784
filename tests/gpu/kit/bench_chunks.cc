// Section "chunks": attention of 2,048 rows beyond 32k tokens by Hopper's kernel, its keys whole
// and in chunks (decisions/006): the time of one slice, the rate of all of them in turns, the error
// of both against the portable kernel, and whether slices change a bit.
#include <algorithm>
#include <memory>

#include "devices/cuda/backend/batch_inputs.h"
#include "kernel_bench.h"

namespace flowprefill {
namespace {

constexpr const char* kSection = "chunks";
constexpr size_t kElements = size_t{kTile} * kHeads * kDim;

// One launch, with what it reads.
struct Lists {
  DeviceBuffer tiles, merges;
  AttentionArgs args;
};
using Slices = std::shared_ptr<std::vector<Lists>>;

class Chunks {
 public:
  explicit Chunks(int context)
      : context_(context),
        blocks_((context + kTile) / kBlockTokens),
        cache_(random_halves(size_t(blocks_) * 2 * kKv * kBlockTokens * kDim, 1, 7)),
        tables_(on_device(shuffled_blocks(blocks_))) {}

  void run(cudaStream_t stream) {
    tell_slices(stream);
    if (!chunks_of(1).has_any(context_ + 1))
      return;
    tell_rates(stream);
    tell_errors(stream);
  }

 private:
  static KeyChunks chunks_of(int times) {
    KeyChunks chunks = KeyChunks::of(kHeads, multiprocessors());
    chunks.count *= times;
    return chunks;
  }

  AttentionArgs args() const {
    return {.q = halves(q_),
            .ld_q = kHeads * kDim,
            .out = halves(out_),
            .ld_out = kHeads * kDim,
            .cache = cache_of(cache_),
            .block_tables = as<const int32_t>(tables_),
            .block_table_stride = blocks_,
            .rows = kTile,
            .num_blocks = 1,
            .partials = floats(partials_),
            .heads = kHeads,
            .kv_heads = kKv,
            .kv_end = kKv,
            .head_dim = kDim};
  }

  // Rows [begin, end) in one launch.
  Lists lists(int begin, int end, const KeyChunks& chunks) const {
    const std::vector<AttentionSlice> slices = row_slices(
        {.row = begin, .rows = end - begin, .position = context_ + begin, .sequence = 0}, chunks);
    const std::vector<AttentionTile> tiles = attention_row_tiles(slices, kDim);
    const std::vector<AttentionTile> merges =
        attention_merges(attention_tiles(slices, kHeads / kKv));
    Lists out{.tiles = on_device(tiles), .merges = on_device(merges), .args = args()};
    out.args.tiles = as<const AttentionTile>(out.tiles);
    out.args.num_tiles = static_cast<int32_t>(tiles.size());
    out.args.merges = as<const AttentionTile>(out.merges);
    out.args.num_merges = static_cast<int32_t>(merges.size());
    for (const AttentionSlice& slice : slices)
      out.args.partial_rows += static_cast<int32_t>(partial_rows_of(slice, kHeads / kKv));
    return out;
  }

  Slices sliced(int rows, const KeyChunks& chunks) const {
    auto slices = std::make_shared<std::vector<Lists>>();
    for (int row = 0; row < kTile; row += rows)
      slices->push_back(lists(row, std::min(row + rows, kTile), chunks));
    return slices;
  }
  static Launch launch_of(const Slices& slices) {
    return [slices](cudaStream_t stream) {
      for (const Lists& one : *slices)
        FP_CUDA(launch_attention_hopper(one.args, stream));
    };
  }

  // Each alone: the longest is what an urgent run may wait for.
  void tell_slices(cudaStream_t stream) {
    for (const auto& [rows, how] : {std::pair{512, KeyChunks{}}, {128, chunks_of(1)}}) {
      std::vector<double> us;
      const Slices slices = sliced(rows, how);
      for (const Lists& one : *slices) {
        us.push_back(device_us(
            [&](cudaStream_t s) { FP_CUDA(launch_attention_hopper(one.args, s)); }, stream, 3));
      }
      say(kSection, name() + ", slices of " + std::to_string(rows) + how_of(how),
          text("%.1f us\t%.1f us the longest", median(us), *std::ranges::max_element(us)));
    }
  }

  void tell_rates(cudaStream_t stream) {
    std::vector<Variant> variants;
    const auto add = [&](int rows, const KeyChunks& chunks, const char* more = "") {
      variants.push_back({"slices of " + std::to_string(rows) + how_of(chunks) + more,
                          launch_of(sliced(rows, chunks))});
    };
    for (const int rows : {512, 2048})
      add(rows, {});
    for (const int rows : {128, 256, 512, 2048})
      add(rows, chunks_of(1));
    add(128, chunks_of(2), ", twice as many");
    const Slices unmerged = sliced(128, chunks_of(1));
    for (Lists& one : *unmerged)
      one.args.num_merges = 0;
    variants.push_back({"slices of 128, in chunks, not merged", launch_of(unmerged)});
    compare(kSection, name(), variants, 5, stream);
    const double pairs = kTile * (context_ + (kTile + 1) / 2.0);
    for (const size_t i : {size_t{0}, size_t{2}}) {
      const double us = device_us(variants[i].launch, stream, 3);
      say(kSection, name() + ", " + variants[i].name,
          text("%.1f TFLOP/s", pairs * 4 * kHeads * kDim / us / 1e6));
    }
  }

  std::vector<Bf16> output(const Launch& launch, cudaStream_t stream) {
    FP_CUDA(cudaMemset(out_.get(), 0xff, out_.bytes()));  // NaN: what it leaves out shows
    FP_CUDA(cudaMemset(partials_.get(), 0xff, partials_.bytes()));
    FP_CUDA(cudaDeviceSynchronize());
    launch(stream);
    return output_of(args(), kElements);
  }

  void tell_errors(cudaStream_t stream) {
    const std::vector<AttentionSlice> all = {
        {.row = 0, .rows = kTile, .position = context_, .sequence = 0}};
    const std::vector<AttentionTile> tiles = attention_tiles(all, kHeads / kKv);
    const DeviceBuffer list = on_device(tiles);
    AttentionArgs whole = args();
    whole.tiles = as<const AttentionTile>(list);
    whole.num_tiles = static_cast<int32_t>(tiles.size());
    const std::vector<Bf16> portable =
        output([&](cudaStream_t s) { FP_CUDA(launch_attention(whole, s)); }, stream);
    const auto hopper = [&](int rows, const KeyChunks& chunks) {
      return output(launch_of(sliced(rows, chunks)), stream);
    };
    tell_difference(kSection, name() + ", whole keys", portable, hopper(2048, {}));
    const std::vector<Bf16> chunked = hopper(2048, chunks_of(1));
    tell_difference(kSection, name() + ", in chunks", portable, chunked);
    const bool is_same =
        hopper(128, chunks_of(1)) == chunked && hopper(640, chunks_of(1)) == chunked;
    say(kSection, name() + ", slices of 128 and 640 rows",
        is_same ? "the same bits" : "OTHER BITS");
  }

  std::string name() const { return "2048 rows on " + std::to_string(context_); }
  static std::string how_of(const KeyChunks& chunks) {
    return chunks.count > 0 ? ", in chunks" : ", whole keys";
  }

  const int context_, blocks_;
  const DeviceBuffer cache_, tables_;
  const DeviceBuffer q_ = random_halves(kElements, 0.13f, 8);
  const DeviceBuffer out_{kElements * sizeof(Bf16)};
  const DeviceBuffer partials_{attention_partial_bytes(
      int64_t{kTile} * (kHeads / kKv) * 2 * multiprocessors() / kHeads, kKv, kDim)};
};

}  // namespace

void bench_chunks(cudaStream_t stream) {
  if (!has_hopper_attention())
    return;
  for (const int context : {30720, 40960, 61440, 126976})
    Chunks(context).run(stream);
}

}  // namespace flowprefill
