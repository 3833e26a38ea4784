// Plans of transformers: which plan a batch gets, what its segments read and write, where inputs
// lie, how many kernels they launch.
#include <gtest/gtest.h>

#include <cstring>
#include <numeric>

#include "devices/cuda/backend/batch_inputs.h"
#include "devices/cuda/kernels/attention_args.h"
#include "model_fixture.h"

namespace flowprefill::testing {
namespace {

class ModelPlanTest : public ModelTest {
 protected:
  void SetUp() override {
    ModelTest::SetUp();
    options_.buckets = {8, 16, 32, 64};
    make_model(tiny_);
  }

  std::unique_ptr<CudaModelProgram> program(const std::vector<Part>& parts) {
    return program_of(batch_of(parts));
  }
  Part prompt(int32_t rows, int32_t context = 0) const {
    return {0, std::vector<int32_t>(static_cast<size_t>(context)), tiny_.random_tokens(rows, 1)};
  }

  const TinyModel tiny_{Kind::kLlama, 2};
};

TEST_F(ModelPlanTest, batch_gets_the_smallest_bucket_within_the_padding_limit) {
  EXPECT_EQ(program({prompt(8)})->bucket(), 8);
  EXPECT_EQ(program({prompt(9)})->bucket(), 16);
  EXPECT_EQ(program({prompt(4)})->bucket(), 8);
  EXPECT_EQ(program({prompt(3)})->bucket(), 0) << "more than twice the size";
  EXPECT_EQ(program({prompt(20), {1, {}, tiny_.random_tokens(20, 1)}})->bucket(), 64);
}

TEST_F(ModelPlanTest, padding_that_takes_longer_than_launches_is_avoided) {
  plan_options_.rates.gemm_flops_per_s = 1e7;
  EXPECT_EQ(program({prompt(20)})->bucket(), 0);
  EXPECT_EQ(program({prompt(32)})->bucket(), 32) << "no padding, nothing to avoid";
  plan_options_.rates.gemm_flops_per_s = 1e15;
  EXPECT_EQ(program({prompt(20)})->bucket(), 32);
}

TEST_F(ModelPlanTest, plans_are_made_for_the_rate_at_which_the_cache_is_read) {
  options_.max_context = 8192;
  options_.cuts.costs.cache_element_bytes = 2;
  model_.reset();
  make_model(tiny_);
  plan_options_.budget_s = 1e-3;
  plan_options_.rates.weight_bytes_per_s = 1e7;
  const auto decode_step = [&](double cache_bytes_per_s) {
    plan_options_.rates.cache_bytes_per_s = cache_bytes_per_s;
    std::vector<Part> parts;
    for (int32_t i = 0; i < 8; ++i)
      parts.push_back({i, {}, {1}});
    Batch batch = batch_of(parts);
    for (Sequence& sequence : batch.sequences) {
      sequence.context = 4096;
      sequence.block_table.assign(8192 / kBlockTokens, 0);
    }
    auto program = program_of(std::move(batch));
    EXPECT_EQ(program->bucket(), 8);
    return program->size();
  };
  const size_t with_slow_reads = decode_step(1e9);
  EXPECT_LT(decode_step(1e15), with_slow_reads);
}

// Eight decode steps; the plan assumes that all have the mean context, but the first has it all.
TEST_F(ModelPlanTest, context_far_above_what_the_plan_assumes_gets_a_plan_of_its_own) {
  options_.max_context = 8192;
  model_.reset();
  make_model(tiny_);
  const auto skewed = [&](int32_t context) {
    std::vector<Part> parts;
    for (int32_t i = 0; i < 8; ++i)
      parts.push_back({i, {}, {1}});
    Batch batch = batch_of(parts);
    batch.sequences[0].context = context;
    batch.sequences[0].block_table.assign(8192 / kBlockTokens, 0);
    return program_of(batch)->bucket();
  };
  // 4 rows, the least slice here, on 1024 keys each take just less than the budget.
  plan_options_.budget_s = 1e-3;
  plan_options_.rates.attention_flops_per_s = 4 * 1025 * 4.0 * 256 / plan_options_.budget_s;
  EXPECT_EQ(skewed(0), 8);
  EXPECT_EQ(skewed(4000), 8);
  EXPECT_EQ(skewed(8000), 0) << "almost twice the budget";
  plan_options_.granularity = Granularity::kLayer;
  EXPECT_EQ(skewed(8000), 8) << "no budget, nothing to keep";
}

TEST_F(ModelPlanTest, predictions_are_the_batch_s_own) {
  plan_options_.rates.attention_flops_per_s = 1e6;
  const auto seconds = [](const CudaModelProgram& p) {
    double sum = 0;
    for (size_t i = 0; i < p.size(); ++i)
      sum += p.label(i).predicted_s;
    return sum;
  };
  plan_options_.granularity = Granularity::kLayer;
  const auto without = program({prompt(8)});
  const auto with = program({prompt(8, 40)});
  ASSERT_EQ(without->bucket(), 8);
  ASSERT_EQ(with->bucket(), 8);
  // 2 layers, 8 rows, 40 keys more each, 4 operations a query column.
  EXPECT_NEAR(seconds(*with) - seconds(*without), 2 * 8 * 40 * 4.0 * 256 / 1e6, 1e-9);
}

TEST_F(ModelPlanTest, labels_name_the_rows_of_the_batch_not_of_the_bucket) {
  plan_options_.granularity = Granularity::kOperator;
  const auto p = program({prompt(13)});
  ASSERT_EQ(p->bucket(), 16);
  EXPECT_EQ(p->label(1).op, std::string("attn_norm"));
  EXPECT_EQ(p->label(1).layer, 0);
  EXPECT_EQ(p->label(1).row_end, 13);
  EXPECT_EQ(p->label(p->size() - 1).op, std::string("final_norm"));
  EXPECT_EQ(p->label(p->size() - 1).layer, -1);
}

TEST_F(ModelPlanTest, live_bytes_are_what_the_operators_left_need) {
  options_.has_graphs = false;
  model_.reset();
  make_model(tiny_);
  plan_options_.granularity = Granularity::kOperator;
  const auto p = program({prompt(10), {1, {}, tiny_.random_tokens(6, 1)}});
  const size_t hidden = 16 * 64 * 4;
  const size_t rotary = 16 * 64 * 4;
  const size_t q = 16 * 256 * 2;
  const size_t context = 16 * 256 * 2;
  const size_t gated = 16 * 72 * 2;
  // embed | norm qkv rope | attention | o | norm gate_up | down | ... | final norm, head
  EXPECT_EQ(p->live_bytes(0), 0u);
  EXPECT_EQ(p->live_bytes(1), hidden + rotary);
  EXPECT_EQ(p->live_bytes(2), hidden + rotary + q);
  EXPECT_EQ(p->live_bytes(3), hidden + rotary + context);
  EXPECT_EQ(p->live_bytes(4), hidden + rotary);
  EXPECT_EQ(p->live_bytes(5), hidden + rotary + gated);
  EXPECT_EQ(p->live_bytes(8), hidden + context) << "the last layer's rotary table is done with";
  EXPECT_EQ(p->live_bytes(11), size_t{2} * 64 * 4) << "the last rows alone";
  ASSERT_EQ(p->size(), 12u);
  EXPECT_EQ(p->live_bytes(12), size_t{2} * (208 + 1) * 4) << "logits and tokens";
}

TEST_F(ModelPlanTest, inputs_hold_the_batch_and_padding_elsewhere) {
  const ModelGraph graph = tiny_.graph();
  const std::vector<AttentionRows> attention = {{0, 8, 0}, {8, 16, 8}};
  const AttentionRules rules(graph, 4, kBlockTokens);
  const PlanShape shape(graph, {.rows = 16, .tile_rows = 8, .sequences = 4}, 16, rules, attention);
  Batch batch = batch_of({{2, {1, 2, 3}, {11, 12, 13, 14, 15}}, {3, {}, {21, 22, 23, 24, 25}}});
  const std::vector<std::byte> bytes = batch_inputs(shape, batch, {});
  ASSERT_EQ(bytes.size(), shape.inputs.bytes);
  const auto words = [&](size_t offset, size_t count) {
    std::vector<int32_t> out(count);
    std::memcpy(out.data(), bytes.data() + offset, count * sizeof(int32_t));
    return out;
  };
  using Words = std::vector<int32_t>;
  EXPECT_EQ(words(shape.inputs.tokens, 11), (Words{11, 12, 13, 14, 15, 21, 22, 23, 24, 25, 0}));
  EXPECT_EQ(words(shape.inputs.sequences, 16),
            (Words{1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(words(shape.inputs.positions, 10), (Words{3, 4, 5, 6, 7, 0, 1, 2, 3, 4}));
  EXPECT_EQ(words(shape.inputs.last_rows, 4), (Words{4, 9, -1, -1}));
  EXPECT_EQ(words(shape.inputs.block_tables, 3),
            (Words{batch.sequences[0].block_table[0], batch.sequences[0].block_table[1], 0}));
  EXPECT_EQ(words(shape.inputs.block_tables + 64, 3),
            (Words{batch.sequences[1].block_table[0], batch.sequences[1].block_table[1], 0}));
  // The second slice: rows 8 and 9, of the second sequence, at the start of the tile buffers.
  ASSERT_EQ(shape.inputs.attention[1].lists.size(), 1u);
  const AttentionLists& lists = shape.inputs.attention[1].lists[0];
  ASSERT_EQ(lists.num_tiles, max_attention_tiles(8, 4, 2)) << "64 keys are never split";
  EXPECT_EQ(lists.num_merges, 0);
  EXPECT_EQ(words(lists.tiles, 8), (Words{0, 3, 2, 0, 4, 0, 0, 0}));
  const size_t padding = static_cast<size_t>(lists.num_tiles) - 1;
  EXPECT_EQ(words(lists.tiles + sizeof(AttentionTile), padding * 8), Words(padding * 8));
}

// Random batches of long and short sequences, cut anywhere: each sequence's chunks are those of its
// own sizes, whatever it is batched with; every launch's partial results fit; nothing is left out.
TEST_F(ModelPlanTest, inputs_split_keys_by_a_sequence_s_own_sizes) {
  ModelGraph graph = tiny_.graph();
  graph.attention = {.heads = 32, .kv_heads = 8, .head_dim = 128};
  std::mt19937 random(5);
  bool has_several = false;
  for (int round = 0; round < 60; ++round) {
    const AttentionRules rules(graph, 132, 16, /*uses_hopper=*/round % 2 == 1);
    const bool is_many = round % 4 == 0;  // more partial results than one launch has room for
    Batch batch;
    for (uint32_t i = is_many ? 100 : random() % 6 + 1; i > 0; --i) {
      const auto rows =
          static_cast<int32_t>(is_many ? 80 : random() % (random() % 2 ? 2 : 300) + 1);
      const auto context = static_cast<int32_t>(is_many ? 30000 : random() % 32000);
      batch.sequences.push_back(
          {.row_begin = batch.rows(), .rows = rows, .context = context, .block_table = {}});
      batch.sequences.back().block_table.resize(static_cast<size_t>((context + rows) / 16 + 1));
      batch.tokens.resize(batch.tokens.size() + static_cast<size_t>(rows));
    }
    const int32_t end = batch.rows();
    const auto cut = static_cast<int32_t>(random() % static_cast<uint32_t>(end));
    std::vector<AttentionRows> rows = {{cut, end, cut}};
    if (cut > 0)
      rows.insert(rows.begin(), {0, cut, 0});
    const PlanSizes sizes{
        .rows = end, .tile_rows = end, .sequences = batch.num_sequences() + round % 3};
    const PlanShape shape(graph, sizes, 2048, rules, rows);
    ASSERT_LE(shape.inputs.bytes, InputLayout::max_bytes(graph, sizes, 2048, rules));
    const std::vector<std::byte> bytes = batch_inputs(shape, batch, {});
    ASSERT_EQ(bytes.size(), shape.inputs.bytes);
    const auto list = [&](size_t offset, int32_t count) {
      std::vector<AttentionTile> out(static_cast<size_t>(count));
      if (count > 0)
        std::memcpy(out.data(), bytes.data() + offset, out.size() * sizeof(AttentionTile));
      std::erase_if(out, [](const AttentionTile& tile) { return tile.sequence == 0; });
      return out;
    };
    std::vector<int64_t> entries(batch.sequences.size());  // computed of all keys
    const auto of_hopper = [&](const AttentionLaunches& launches) {
      if (launches.row_lists.empty())
        return;
      const AttentionLists& lists = launches.row_lists.front();
      EXPECT_EQ(lists.num_merges, 0) << "no key is beyond 32k";
      for (const AttentionTile& tile : list(lists.tiles, lists.num_tiles)) {
        const auto of = static_cast<size_t>(tile.sequence) - 1;
        EXPECT_TRUE(rules.is_for_hopper(batch.sequences[of].rows));
        entries[of] += 4 * std::min(attention_rows_of_tile(128), tile.entries - tile.entry);
      }
    };
    for (const AttentionLaunches& launches : shape.inputs.attention) {
      has_several |= launches.lists.size() > 1;
      of_hopper(launches);
      ASSERT_LE(rules.scratch_bytes(rules.needs(end, sizes.sequences, 2048)), size_t{257} << 20);
      for (const AttentionLists& lists : launches.lists) {
        const std::vector<AttentionTile> tiles = list(lists.tiles, lists.num_tiles);
        ASSERT_EQ(list(lists.merges, lists.num_merges).size(), attention_merges(tiles).size());
        for (const AttentionTile& tile : tiles) {
          const auto of = static_cast<size_t>(tile.sequence) - 1;
          const Sequence& s = batch.sequences[of];
          ASSERT_EQ(tile.chunk_keys, rules.split.chunk_keys(s.rows, s.length()));
          ASSERT_FALSE(rules.is_for_hopper(s.rows));
          ASSERT_LE(tile.chunk_keys == 0 ? 0 : tile.partial + (tile.chunk + 1) * tile.entries,
                    launches.partial_rows);
          if (tile.chunk == 0)
            entries[of] += std::min(kAttentionEntries, tile.entries - tile.entry);
        }
      }
    }
    for (size_t i = 0; i < entries.size(); ++i)
      ASSERT_EQ(entries[i], batch.sequences[i].rows * 4);
  }
  EXPECT_TRUE(has_several);
}

// Eager, captured, then replayed: what was launched is what the plan counts by.
class ModelLaunchesTest : public ModelTest {
 protected:
  void expect_counted(const TinyModel& tiny, const std::vector<Part>& parts) {
    std::vector<size_t> counted, launched;
    size_t before = 0;
    before_launch_ = [&](Program&, size_t) { before = fake_cudart::count("cudaLaunchKernel"); };
    after_launch_ = [&](Program& program, size_t segment) {
      launched.push_back(fake_cudart::count("cudaLaunchKernel") - before);
      counted.push_back(dynamic_cast<CudaModelProgram&>(program).num_kernels(segment));
    };
    make_model(tiny);
    start();
    execute(1, parts);
    EXPECT_EQ(counted, launched) << "eager";
    const std::vector<size_t> of_segments = counted;
    execute(2, parts);
    launched.clear();
    execute(3, parts);
    size_t nodes = 0;
    for (size_t i = 0; i < launched.size(); ++i) {
      const bool is_replayed = launched[i] == 0;
      EXPECT_EQ(is_replayed ? of_segments[i] : launched[i], of_segments[i]);
      nodes += is_replayed ? of_segments[i] : 0;
    }
    EXPECT_GT(nodes, 0u);
    EXPECT_EQ(model_->graph_report().bytes, nodes * fake_cudart::kBytesPerNode);
    tear_down();
  }
  int64_t num_ran(const char* name) const { return std::ranges::count(fake_kernels::ran(), name); }
};

TEST_F(ModelLaunchesTest, of_products_are_counted_as_they_are_made) {
  const std::vector<Part> parts = {{0, {}, TinyModel(Kind::kQwen).random_tokens(10, 1)},
                                   {1, {}, TinyModel(Kind::kQwen).random_tokens(6, 2)}};
  for (const bool is_fp8 : {false, true}) {
    for (const Granularity granularity : {Granularity::kNone, Granularity::kOperator}) {
      fake_kernels::reset();
      options_.quantizes_fp8 = is_fp8;
      plan_options_.granularity = granularity;
      expect_counted(TinyModel(Kind::kQwen, 1), parts);
      EXPECT_EQ(num_ran("quantise"), is_fp8 ? 3 * 3 : 0) << "of qkv, o and gate_up, three times";
    }
  }
}

// A norm with the product of at most 2 rows, a rope with one of at most 8; that before the head is
// of other rows than it reads. A product in slices has its norm and its rope apart.
TEST_F(ModelLaunchesTest, of_few_rows_have_norm_and_rope_in_the_product) {
  constexpr int kRuns = 3;
  constexpr int kLayers = 2;
  struct Case {
    int32_t rows;
    int fused, norms, ropes;  // of a layer
  };
  for (const Case& of : {Case{1, 2, 0, 0}, Case{2, 2, 0, 0}, Case{4, 1, 2, 0}, Case{16, 0, 2, 1}}) {
    fake_kernels::reset();
    const TinyModel tiny(Kind::kLlama, kLayers);  // no head is normed
    expect_counted(tiny, {{0, {}, tiny.random_tokens(of.rows, 1)}});
    EXPECT_EQ(num_ran("fused"), kRuns * kLayers * of.fused) << of.rows << " rows";
    EXPECT_EQ(num_ran("rms_norm"), kRuns * (kLayers * of.norms + 1)) << of.rows << " rows";
    EXPECT_EQ(num_ran("rope"), kRuns * kLayers * of.ropes) << of.rows << " rows";
  }
}

TEST_F(ModelLaunchesTest, of_split_attention_are_counted_as_they_are_made) {
  options_.max_context = 4096;
  expect_counted(TinyModel(Kind::kLlama, 2), {{0, {}, {5}}});
  EXPECT_EQ(num_ran("attention_merge"), 2 * 3) << "two layers, three times";
}

// The last rows of a prompt beyond 32k tokens; the first have no chunks.
TEST_F(ModelLaunchesTest, of_attention_over_chunks_of_keys_are_counted_as_they_are_made) {
  if (!fake_kernels::has_bodies())
    GTEST_SKIP() << "32k keys take too long under a sanitizer";
  fake_cudart::set_compute_capability(90);
  constexpr int32_t kTokens = 64;  // of a block
  constexpr int32_t kRows = 128;
  options_.has_graphs = false;
  options_.max_context = 34000;
  options_.max_tokens = kRows;
  options_.cuts.max_tile_rows = kRows;
  plan_options_.granularity = Granularity::kNone;
  const TinyModel tiny(Kind::kLlama, 1);
  std::vector<int64_t> merges;
  for (const int32_t context : {32768 - kRows, 32768 - kRows / 2}) {
    Batch batch;
    batch.tokens = tiny.random_tokens(kRows, 1);
    batch.sequences.push_back({.row_begin = 0,
                               .rows = kRows,
                               .context = context,
                               .block_table = std::vector<int32_t>(1000)});
    model_ = std::make_unique<CudaBackend>(tiny.graph(), options_);
    tiny.load_into(*model_);
    model_->allocate_cache(kTokens, 1);
    start();
    size_t before = 0, counted = 0, launched = 0;
    before_launch_ = [&](Program&, size_t) { before = fake_cudart::count("cudaLaunchKernel"); };
    after_launch_ = [&](Program& program, size_t segment) {
      launched += fake_cudart::count("cudaLaunchKernel") - before;
      counted += dynamic_cast<CudaModelProgram&>(program).num_kernels(segment);
    };
    fake_kernels::reset();
    add(1, program_of(std::move(batch)));
    execute_to_end(1);
    EXPECT_EQ(counted, launched + 2) << "all but the portable kernels: padding";
    EXPECT_EQ(num_ran("attention_hopper"), 1);
    EXPECT_EQ(num_ran("attention"), 0);
    merges.push_back(num_ran("attention_merge"));
    tear_down();
  }
  EXPECT_EQ(merges, (std::vector<int64_t>{0, 1}));
}

}  // namespace
}  // namespace flowprefill::testing
