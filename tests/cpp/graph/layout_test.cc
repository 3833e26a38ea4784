// Where activations lie, which bytes steps read and write, which bytes live at a boundary.
#include "graph/layout.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>

#include "graph/compiled_program.h"
#include "graph/graph_variants.h"
#include "graph_fixture.h"

namespace flowprefill::testing {
namespace {

constexpr LayoutRules kRules{.elements = {.activation = 2, .product = 2}, .logits_stride = 208};

int32_t product_with_its_rope(const ModelGraph& graph, int32_t index) {
  const bool is_one = graph.op(index).kind == OperatorKind::kLinear &&
                      index + 1 < static_cast<int32_t>(graph.operators.size()) &&
                      graph.op(index + 1).kind == OperatorKind::kRope;
  return is_one ? index + 1 : index;
}

bool meet(const LiveRange& a, const LiveRange& b) {
  return a.offset < b.end() && b.offset < a.end();
}

class LayoutTest : public ::testing::Test {
 protected:
  // The MLP adds to what attention left in a tensor of the tile, as where both see the same input.
  static ModelGraph parallel_graph() {
    ModelGraph graph = llama_graph({.intermediate_size = 1024});
    const int32_t sum = tensor_named(graph, "last");
    graph.tensors.insert(graph.tensors.begin() + sum, {.name = "sum", .columns = 64});
    for (Operator& op : graph.operators) {
      for (int32_t* tensor : {&op.input, &op.output, &op.rotary})
        *tensor += *tensor >= sum ? 1 : 0;
      if (op.epilogue == Epilogue::kAdd)
        op.output = sum;
      if (op.name == std::string("o_proj"))
        op.epilogue = Epilogue::kStore;
    }
    return checked(std::move(graph));
  }
  static void expect_no_overlap(const ModelGraph& graph, const Layout& layout,
                                ModelGraph::Range range) {
    std::set<int32_t> read_later;
    for (int32_t i = range.end; i-- > range.begin;) {
      const Operator& op = graph.op(i);
      if (!reads_output(op))
        read_later.erase(op.output);
      for (const int32_t read : {op.input, op.rotary}) {
        if (read >= 0)
          read_later.insert(read);
      }
      for (const int32_t other : read_later) {
        EXPECT_TRUE(other == op.output || !meet(layout.all(op.output), layout.all(other)))
            << op.name << " overwrites " << graph.tensor(other).name;
      }
      if (reads_output(op))
        read_later.insert(op.output);
    }
  }
  static std::vector<ModelGraph> graphs() {
    return {llama_graph({.num_layers = 3}),
            with_sampling(llama_graph({.hidden_size = 256, .intermediate_size = 1024})),
            llama_graph({.intermediate_size = 512, .num_heads = 8, .num_kv_heads = 8}),
            parallel_graph(),
            with_output(llama_graph(), RunOutput::kScores),
            with_output(llama_graph(), RunOutput::kMean)};
  }
};

// Goes through a layer, and what follows the layers, from behind: what an operator writes must not
// lie on what later ones read.
TEST_F(LayoutTest, no_two_tensors_that_hold_something_at_once_overlap) {
  for (const ModelGraph& graph : graphs()) {
    for (const int32_t tile_rows : {1, 3, 32, 100}) {
      const Layout layout(
          graph, kRules,
          {.rows = 100, .tile_rows = tile_rows, .sequences = 4, .head_tile_rows = 8});
      expect_no_overlap(graph, layout, graph.layer(0));
      expect_no_overlap(graph, layout, graph.rows_after_layers());
    }
  }
}

TEST_F(LayoutTest, tensors_of_the_prompt_and_of_sequences_overlap_no_others) {
  for (const ModelGraph& graph : graphs()) {
    const Layout layout(graph, kRules, {.rows = 50, .tile_rows = 20, .sequences = 3});
    for (int32_t a = 0; a < static_cast<int32_t>(graph.tensors.size()); ++a) {
      EXPECT_LE(layout.all(a).end(), layout.bytes());
      for (int32_t b = 0; b < a; ++b) {
        const auto is_of_tile = [&](int32_t tensor) {
          const Extent extent = graph.tensor(tensor).extent;
          return extent == Extent::kTile || extent == Extent::kHeadTile;
        };
        EXPECT_TRUE((is_of_tile(a) && is_of_tile(b)) || !meet(layout.all(a), layout.all(b)))
            << graph.tensor(a).name << " and " << graph.tensor(b).name;
      }
    }
  }
}

TEST_F(LayoutTest, dead_tensors_make_room_for_others) {
  const ModelGraph graph = llama_graph({.hidden_size = 256, .intermediate_size = 1024});
  const Layout layout(graph, kRules, {.rows = 64, .tile_rows = 64, .sequences = 1});
  size_t of_tile = 0;
  for (int32_t i = 0; i < static_cast<int32_t>(graph.tensors.size()); ++i)
    of_tile += graph.tensor(i).extent == Extent::kTile ? layout.all(i).bytes : 0;
  const size_t others = layout.all(tensor_named(graph, "hidden")).bytes +
                        layout.all(tensor_named(graph, "rotary")).bytes +
                        layout.all(tensor_named(graph, "logits")).bytes + 512;
  EXPECT_LT(layout.bytes() - others, of_tile * 2 / 3);
}

TEST_F(LayoutTest, a_smaller_plan_never_needs_more) {
  for (const ModelGraph& graph : graphs()) {
    size_t before = 0;
    for (int32_t rows = 1; rows <= 200; ++rows) {
      for (const int32_t tile_rows : {std::max(1, rows - 1), rows}) {
        const Layout layout(graph, kRules, {.rows = rows, .tile_rows = tile_rows, .sequences = 4});
        EXPECT_GE(layout.bytes(), before) << rows << " rows, tile of " << tile_rows;
        before = layout.bytes();
      }
    }
  }
}

// Queries exactly fill the gap between the product that makes them and what lies behind gated rows:
// where rows are no multiple of the alignment, too.
TEST_F(LayoutTest, a_smaller_plan_never_needs_more_where_tensors_fill_a_gap) {
  const ModelGraph graph = llama_graph({.hidden_size = 576,
                                        .intermediate_size = 1536,
                                        .num_layers = 1,
                                        .num_heads = 9,
                                        .num_kv_heads = 3});
  LayoutRules rules = kRules;
  rules.last_of_kernel = product_with_its_rope;
  size_t before = 0;
  for (int32_t rows = 1; rows <= 600; ++rows) {
    const Layout layout(graph, rules, {.rows = rows, .tile_rows = rows, .sequences = 1});
    EXPECT_GE(layout.bytes(), before) << rows << " rows";
    before = layout.bytes();
    const LiveRange q = layout.all(tensor_named(graph, "q"));
    EXPECT_FALSE(meet(layout.all(tensor_named(graph, "normed")), q));
    EXPECT_EQ(q.offset % rules.alignment, 0u);
  }
}

TEST_F(LayoutTest, result_is_the_logits_and_what_is_made_of_them_side_by_side) {
  const ModelGraph graph = with_sampling(llama_graph());
  const Layout layout(graph, kRules, {.rows = 10, .tile_rows = 10, .sequences = 3});
  const int32_t logits = graph.logits();
  const int32_t sampled = tensor_named(graph, "sampled");
  EXPECT_EQ(layout.stride(logits), 208);
  EXPECT_EQ(layout.all(logits).bytes, size_t{3} * 208 * 4);
  EXPECT_EQ(layout.offset(sampled), layout.all(logits).end());
  EXPECT_EQ(layout.result(), (LiveRange{layout.offset(logits), size_t{3} * (208 + 1) * 4}));
  EXPECT_EQ(layout.offset(logits) % 256, 0u);
}

TEST_F(LayoutTest, a_step_reads_and_writes_its_own_rows) {
  const ModelGraph graph = llama_graph({.num_layers = 1});
  const Layout layout(graph, kRules, {.rows = 32, .tile_rows = 16, .sequences = 2});
  const auto index = [&](const std::string& name) {
    for (int32_t i = 0; i < static_cast<int32_t>(graph.operators.size()); ++i) {
      if (graph.op(i).name == name)
        return i;
    }
    return -1;
  };
  const auto access = [&](const std::string& first, const std::string& last, Step step) {
    step.first = index(first);
    step.last = index(last);
    return access_of(graph, layout, step, {});
  };
  const int32_t hidden = tensor_named(graph, "hidden");
  const int32_t context = tensor_named(graph, "context");
  const Step tile{.row_begin = 20, .row_end = 28, .base = 16};
  const SegmentAccess o = access("o_proj", "o_proj", tile);
  EXPECT_EQ(o.writes, LiveSet({layout.rows(hidden, 20, 28)}));
  EXPECT_EQ(o.reads, LiveSet({layout.rows(hidden, 20, 28), layout.rows(context, 4, 12)}));
  // What a step writes itself it does not need from before.
  const SegmentAccess chain = access("attn_norm", "rope", tile);
  EXPECT_EQ(chain.reads, LiveSet({layout.rows(hidden, 20, 28),
                                  layout.rows(tensor_named(graph, "rotary"), 20, 28)}));
}

// The first part begins the rows anew, the others keep what is there of them.
TEST_F(LayoutTest, parts_have_the_whole_rows) {
  const ModelGraph graph = llama_graph();
  const Layout layout(graph, kRules, {.rows = 64, .tile_rows = 16, .sequences = 4});
  const auto access = [&](const std::string& name, Step step) {
    while (graph.op(step.first).name != name)
      ++step.first;
    step.last = step.first;
    return access_of(graph, layout, step, {});
  };
  const LiveRange context = layout.rows(tensor_named(graph, "context"), 4, 12);
  Step heads{.row_begin = 20, .row_end = 28, .base = 16, .part_begin = 0, .part_end = 1};
  const LiveSet inputs = access("attention", heads).reads;
  EXPECT_EQ(inputs.without(LiveSet({context})), inputs);
  EXPECT_EQ(access("attention", heads).writes, LiveSet({context}));
  heads.part_begin = 1;
  heads.part_end = 2;
  EXPECT_EQ(access("attention", heads).writes, LiveSet({context}));
  EXPECT_EQ(access("attention", heads).reads, inputs.united(LiveSet({context})));
  const Step last_part{.row_begin = 0, .row_end = 2, .part_begin = 3, .part_end = 4};
  const LiveSet logits({layout.all(graph.logits())});
  EXPECT_EQ(access("lm_head", last_part).writes, logits);
  EXPECT_EQ(access("lm_head", last_part).reads.united(logits), access("lm_head", last_part).reads);
}

TEST_F(LayoutTest, final_norm_reads_the_last_rows_or_any) {
  const ModelGraph graph = llama_graph();
  const Layout layout(graph, kRules, {.rows = 32, .tile_rows = 32, .sequences = 2});
  const int32_t hidden = tensor_named(graph, "hidden");
  const int32_t norm = graph.after_layers().begin;
  const Step step{.first = norm, .last = norm, .row_begin = 0, .row_end = 2};
  EXPECT_EQ(access_of(graph, layout, step, {}).reads, LiveSet({layout.all(hidden)}));
  EXPECT_EQ(access_of(graph, layout, step, {9, 31}).reads,
            LiveSet({layout.rows(hidden, 9, 10), layout.rows(hidden, 31, 32)}));
}

// Executes plans on bytes: each written byte gets the number of its segment. What a segment reads
// must be what was live before it, and a segment before it must have written all that it reads.
TEST_F(LayoutTest, live_sets_are_exactly_the_bytes_that_are_read_later) {
  const ModelGraph graph = with_sampling(llama_graph());
  const Batch batch = batch_with({{20, 0}, {13, 5}});
  const CutRules cuts{.row_step = 4,
                      .max_tile_rows = 16,
                      .min_tile_rows = 8,
                      .min_product_parts = 1,
                      .attention_slices = AttentionSlices::kHeadsFirst,
                      .embed_rows = 10,
                      .costs = {}};
  for (const double budget_s : {1.0, 1e-6, 1e-12}) {
    PlanOptions options{.budget_s = budget_s, .rates = {.step_overhead_s = 0}};
    const Plan plan = make_plan(graph, batch, options, cuts);
    const Layout layout(graph, kRules, {.rows = 33, .tile_rows = plan.tile_rows, .sequences = 2});
    std::vector<SegmentAccess> accesses;
    for (size_t i = 0; i < plan.size(); ++i) {
      SegmentAccess access;
      for (const Step& step : plan.segment(i))
        access = joined(access, access_of(graph, layout, step, last_rows(batch)));
      accesses.push_back(access);
    }
    const std::vector<LiveSet> live = live_sets(accesses, LiveSet({layout.result()}));
    ASSERT_EQ(live.front().bytes(), 0u) << "something is read that no segment wrote";
    std::vector<bool> needed(layout.bytes());  // from behind: read later, before it is written
    const auto mark = [&](const LiveSet& set, bool value) {
      for (const LiveRange& range : set.ranges())
        std::fill_n(needed.begin() + static_cast<ptrdiff_t>(range.offset), range.bytes, value);
    };
    mark(LiveSet({layout.result()}), true);
    for (size_t i = plan.size(); i-- > 0;) {
      const auto steps = plan.segment(i);
      for (size_t s = steps.size(); s-- > 0;) {
        for (int32_t op = steps[s].last; op >= steps[s].first; --op) {
          Step one = steps[s];
          one.first = one.last = op;
          const SegmentAccess access = access_of(graph, layout, one, last_rows(batch));
          mark(access.writes, false);
          mark(access.reads, true);
        }
      }
      const auto count = static_cast<size_t>(std::ranges::count(needed, true));
      EXPECT_EQ(live[i].bytes(), count) << "before segment " << i;
      for (const LiveRange& range : live[i].ranges()) {
        for (size_t byte = range.offset; byte < range.end(); ++byte)
          ASSERT_TRUE(needed[byte]);
      }
    }
  }
}

}  // namespace
}  // namespace flowprefill::testing
