// Whole real programs: what CudaModel computes, compared with a plain transformer, by batches,
// buckets, granularities, graphs.
#include <gtest/gtest.h>

#include "model_fixture.h"

namespace flowprefill::testing {
namespace {

class ModelKinds : public ModelTest, public ::testing::WithParamInterface<Kind> {};

TEST_P(ModelKinds, one_prompt_gives_the_logits_of_the_plain_transformer) {
  const TinyModel tiny(GetParam(), 3);
  make_model(tiny);
  start();
  const std::vector<int32_t> tokens = tiny.random_tokens(37, 7);
  const auto got = execute(1, {{.sequence = 2, .tokens = tokens}});
  expect_close(got[0], tiny.logits(tokens), "logits");
  const auto best = std::ranges::max_element(got[0]) - got[0].begin();
  EXPECT_EQ(programs_.at(1)->sampled()[0], best);
}

TEST_P(ModelKinds, packed_prompts_continued_and_decoded_follow_the_plain_transformer) {
  const TinyModel tiny(GetParam(), 3);
  make_model(tiny);
  start();
  const std::vector<int32_t> a = tiny.random_tokens(40, 1);
  const std::vector<int32_t> b = tiny.random_tokens(40, 2);
  const std::vector<int32_t> c = tiny.random_tokens(40, 3);
  // Three prompts; each longer by some rows; one decode step; all three kinds in one batch.
  size_t at_a = 5;
  size_t at_b = 17;
  size_t at_c = 1;
  const auto step = [&](uint32_t id, size_t add_a, size_t add_b, size_t add_c) {
    const auto part = [&](int32_t sequence, const std::vector<int32_t>& tokens, size_t begin,
                          size_t end) {
      return Part{sequence, first(tokens, begin), between(tokens, begin, end)};
    };
    const auto got = execute(id, {part(0, a, id == 1 ? 0 : at_a, at_a + add_a),
                                  part(1, b, id == 1 ? 0 : at_b, at_b + add_b),
                                  part(2, c, id == 1 ? 0 : at_c, at_c + add_c)});
    at_a += add_a;
    at_b += add_b;
    at_c += add_c;
    const std::string run = "run " + std::to_string(id) + ", sequence ";
    expect_close(got[0], tiny.logits(first(a, at_a)), run + "0");
    expect_close(got[1], tiny.logits(first(b, at_b)), run + "1");
    expect_close(got[2], tiny.logits(first(c, at_c)), run + "2");
  };
  step(1, 0, 0, 0);
  step(2, 7, 3, 11);
  step(3, 1, 1, 1);
  step(4, 1, 1, 1);
  step(5, 1, 9, 2);
}

std::string name_of(const ::testing::TestParamInfo<Kind>& kind) {
  const char* names[] = {"Llama", "Qwen", "Window", "Tied"};
  return names[static_cast<size_t>(kind.param)];
}

INSTANTIATE_TEST_SUITE_P(Kinds, ModelKinds,
                         ::testing::Values(Kind::kLlama, Kind::kQwen, Kind::kWindow, Kind::kTied),
                         name_of);

}  // namespace
}  // namespace flowprefill::testing
