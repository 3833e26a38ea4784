// Section "cuts": what it costs to stop between kernels and to cut them, each variant in turn with
// the others, so that clocks and temperature are the same for all: events between products of 100
// us, products of 2,048 rows in slices of columns and of rows, attention of 2,048 rows in slices of
// heads and of rows. Shares are medians of the rounds, each against the first variant of its round.
#include <algorithm>
#include <memory>
#include <numeric>

#include "devices/cuda/backend/gemm_selector.h"
#include "devices/cuda/runtime/stream_event.h"
#include "kernel_bench.h"

namespace flowprefill {
namespace {

// ---- products

struct Products {
  Products() {
    std::string reason;
    selector = make_selector(&reason);
    say("cuts", "cublaslt", reason.empty() ? "loaded" : "not loaded: " + reason);
  }

  std::unique_ptr<GemmSelector> selector;
  DeviceBuffer a = random_halves(size_t{kTile} * kInner, 1, 9);
  DeviceBuffer weights = random_halves(size_t{2} * 2 * kInner * kHidden, 0.02f, 10);
  DeviceBuffer d{size_t{kTile} * kInner * 4};
  DeviceBuffer scratch{size_t{512} << 20};
  size_t copy = 0;  // two copies of the weights take turns

  // A whole product of 2,048 rows as an engine launches it.
  GemmArgs whole(int columns, int depth, bool adds, bool gated) {
    copy = 1 - copy;
    GemmArgs args = product_args(a, depth, weights, columns, d, kTile, adds);
    args.b += copy * 2 * kInner * kHidden;
    args.ldd = gated ? columns / 2 : columns;
    args.is_gated = gated;
    args.operator_rows = 4 * kTile;
    args.operator_columns = columns;
    return args;
  }
  // Without it a library refuses, and the next candidate is taken.
  void prepare(const GemmArgs& args) const { selector->prepare({&args, 1}); }
  void launch(const GemmArgs& args, cudaStream_t stream) const {
    selector->launch(args, {scratch.get(), scratch.bytes()}, stream);
  }
};

GemmArgs columns_of(GemmArgs args, int begin, int end) {
  const int column = args.is_gated ? begin / 2 : begin;
  args.b += int64_t{begin} * args.ldb;
  args.d = args.output == GemmOutput::kFloat
               ? static_cast<void*>(static_cast<float*>(args.d) + column)
               : static_cast<void*>(static_cast<Bf16*>(args.d) + column);
  args.columns = end - begin;
  return args;
}

// widths: of the slices in succession; rows: of each.
Variant sliced(Products& products, const std::string& name, std::vector<int> widths, int rows,
               int depth, bool gated) {
  const int columns = std::accumulate(widths.begin(), widths.end(), 0);
  products.prepare(products.whole(columns, depth, !gated && columns == kHidden, gated));
  return {name, [&products, widths, rows, columns, depth, gated](cudaStream_t stream) {
            GemmArgs args = products.whole(columns, depth, !gated && columns == kHidden, gated);
            for (int row = 0; row < kTile; row += rows) {
              args.row_begin = row;
              args.row_end = row + rows;
              int column = 0;
              for (const int width : widths) {
                products.launch(columns_of(args, column, column + width), stream);
                column += width;
              }
            }
          }};
}

void bench_products(Products& products, cudaStream_t stream) {
  const auto gate_up = [&](const std::string& name, std::vector<int> widths, int rows = kTile) {
    return sliced(products, name, std::move(widths), rows, kHidden, true);
  };
  compare(
      "cuts", "gate_up x 2048",
      {gate_up("whole", {28672}), gate_up("2 halves", {14336, 14336}),
       gate_up("2 as planned", {10496, 18176}), gate_up("2, as 49 and 41 of 320", {15680, 12992}),
       gate_up("3 equal", {9600, 9600, 9472}), gate_up("3 as planned", {7680, 10496, 10496}),
       gate_up("4 quarters", {7168, 7168, 7168, 7168}), gate_up("2 halves of rows", {28672}, 1024)},
      15, stream);
  const auto down = [&](const std::string& name, std::vector<int> widths, int rows = kTile) {
    return sliced(products, name, std::move(widths), rows, kInner, false);
  };
  compare("cuts", "down x 2048",
          {down("whole", {4096}), down("2 halves", {2048, 2048}),
           down("3072 and 1024", {3072, 1024}), down("2 halves of rows", {4096}, 1024)},
          15, stream);
}

// ---- events between products

struct PlainEvent {
  explicit PlainEvent(unsigned flags) { FP_CUDA(cudaEventCreateWithFlags(&event, flags)); }
  ~PlainEvent() { static_cast<void>(cudaEventDestroy(event)); }
  PlainEvent(const PlainEvent&) = delete;
  cudaEvent_t event = nullptr;
};

void bench_events(Products& products, cudaStream_t stream) {
  constexpr int kProducts = 24;
  products.prepare(products.whole(kHidden, kHidden, true, false));
  const auto between = [&](int count, unsigned flags) {
    auto first = std::make_shared<PlainEvent>(flags), second = std::make_shared<PlainEvent>(flags);
    return [&products, count, first, second](cudaStream_t s) {
      for (int i = 0; i < kProducts; ++i) {
        products.launch(products.whole(kHidden, kHidden, true, false), s);
        if (count > 0)
          FP_CUDA(cudaEventRecord(first->event, s));
        if (count > 1)
          FP_CUDA(cudaEventRecord(second->event, s));
      }
    };
  };
  compare("cuts", "24 products o x 2048, after each",
          {{"nothing", between(0, cudaEventDefault)},
           {"two events that wake", between(2, cudaEventBlockingSync)},
           {"one event that wakes", between(1, cudaEventBlockingSync)},
           {"two events", between(2, cudaEventDefault)},
           {"one event", between(1, cudaEventDefault)},
           {"one event without time", between(1, cudaEventDisableTiming)},
           {"one event without time that wakes",
            between(1, cudaEventDisableTiming | cudaEventBlockingSync)}},
          15, stream);
}

// ---- attention

struct Slice {
  DeviceBuffer tiles;
  AttentionArgs args;
};

// 2,048 rows on a context by Hopper's kernel, in slices of so many rows and KV heads.
Variant attention(const AttentionArgs& all, int context, int rows, int kv_heads) {
  auto slices = std::make_shared<std::vector<Slice>>();
  for (int row = 0; row < kTile; row += rows) {
    const AttentionSlice slice{.row = row, .rows = rows, .position = context + row, .sequence = 0};
    for (int kv = 0; kv < kKv; kv += kv_heads) {
      const std::vector<AttentionTile> tiles = attention_row_tiles({&slice, 1}, kDim);
      Slice one{.tiles = on_device(tiles), .args = all};
      one.args.tiles = as<const AttentionTile>(one.tiles);
      one.args.num_tiles = static_cast<int32_t>(tiles.size());
      one.args.kv_begin = kv;
      one.args.kv_end = kv + kv_heads;
      slices->push_back(std::move(one));
    }
  }
  return {std::to_string(rows) + " rows x " + std::to_string(kv_heads) + " KV heads",
          [slices](cudaStream_t stream) {
            for (const Slice& one : *slices)
              FP_CUDA(launch_attention_hopper(one.args, stream));
          }};
}

void bench_attention_slices(int context, int rounds, cudaStream_t stream) {
  const int blocks = (context + kTile) / kBlockTokens;
  const int64_t half = int64_t{kKv} * kBlockTokens * kDim;
  const DeviceBuffer cache = random_halves(size_t(blocks) * 2 * size_t(half), 1, 7);
  const DeviceBuffer q = random_halves(size_t{kTile} * kHeads * kDim, 0.13f, 8), out(q.bytes());
  const DeviceBuffer tables = on_device(shuffled_blocks(blocks));
  const AttentionArgs args{.q = halves(q),
                           .ld_q = kHeads * kDim,
                           .out = halves(out),
                           .ld_out = kHeads * kDim,
                           .cache = cache_of(cache),
                           .block_tables = as<const int32_t>(tables),
                           .block_table_stride = blocks,
                           .rows = kTile,
                           .heads = kHeads,
                           .kv_heads = kKv,
                           .kv_end = kKv,
                           .head_dim = kDim};
  std::vector<Variant> variants;
  for (const auto& [rows, heads] : {std::pair{2048, 8},
                                    {2048, 4},
                                    {2048, 2},
                                    {1024, 8},
                                    {1024, 4},
                                    {512, 8},
                                    {2048, 1},
                                    {256, 8}})
    variants.push_back(attention(args, context, rows, heads));
  compare("cuts", "attention of 2048 rows on " + std::to_string(context), variants, rounds, stream);
}

}  // namespace

void bench_cuts(cudaStream_t stream) {
  {
    Products products;
    bench_events(products, stream);
    bench_products(products, stream);
  }
  if (!has_hopper_attention())
    return;
  bench_attention_slices(6144, 9, stream);
  bench_attention_slices(30720, 7, stream);
  bench_attention_slices(126976, 3, stream);
}

}  // namespace flowprefill
