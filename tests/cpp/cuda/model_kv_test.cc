// The KV cache on the device as a KvStore: what is written is read, what runs leave there is what
// they should, and a cache carried to another model serves its runs.
#include <gtest/gtest.h>

#include <random>

#include "model_fixture.h"

namespace flowprefill::testing {
namespace {

class ModelKvTest : public ModelTest {
 protected:
  // Values that bf16 holds.
  std::vector<float> some_values(uint32_t seed) const {
    std::mt19937 random(seed);
    std::vector<float> values(model_->kv()->layout().values_per_block());
    for (float& value : values)
      value = widen(static_cast<Bf16>(random() % 0x4000));
    return values;
  }
  std::vector<float> read(int32_t layer, int32_t block) const {
    std::vector<float> values(model_->kv()->layout().values_per_block());
    model_->kv()->read(layer, block, values);
    return values;
  }
};

TEST_F(ModelKvTest, what_is_written_to_a_block_is_read_there_and_nowhere_else) {
  make_model(TinyModel(Kind::kLlama, 3));
  KvStore& kv = *model_->kv();
  EXPECT_EQ(kv.layout().values_per_block(), size_t{2} * 2 * kBlockTokens * 64);
  for (int32_t layer = 0; layer < 3; ++layer) {
    for (const int32_t block : {0, 7, kBlocks - 1})
      kv.write(layer, block, some_values(static_cast<uint32_t>(100 * layer + block)));
  }
  for (int32_t layer = 0; layer < 3; ++layer) {
    for (const int32_t block : {0, 7, kBlocks - 1})
      EXPECT_EQ(read(layer, block), some_values(static_cast<uint32_t>(100 * layer + block)));
    EXPECT_EQ(read(layer, 8), std::vector<float>(kv.layout().values_per_block()));
  }
  kv.zero(std::vector<int32_t>{7});
  EXPECT_EQ(read(1, 7), std::vector<float>(kv.layout().values_per_block()));
  EXPECT_EQ(read(1, 0), some_values(100));
}

TEST_F(ModelKvTest, place_that_it_has_not_is_named) {
  make_model(TinyModel(Kind::kLlama, 2));
  std::vector<float> values(model_->kv()->layout().values_per_block());
  KvStore& kv = *model_->kv();
  EXPECT_THROW(kv.read(2, 0, values), std::invalid_argument);
  EXPECT_THROW(kv.read(0, kBlocks, values), std::invalid_argument);
  EXPECT_THROW(kv.write(-1, 0, values), std::invalid_argument);
  EXPECT_THROW(kv.write(0, -1, values), std::invalid_argument);
  values.pop_back();
  EXPECT_THROW(kv.read(0, 0, values), std::invalid_argument);
  EXPECT_THROW(kv.zero(std::vector<int32_t>{kBlocks}), std::invalid_argument);
}

TEST_F(ModelKvTest, a_cuda_call_that_fails_is_thrown_and_leaves_the_cache_usable) {
  make_model(TinyModel(Kind::kLlama, 1));
  KvStore& kv = *model_->kv();
  const std::vector<float> values = some_values(1);
  const auto copies = [&] {
    kv.zero(std::vector<int32_t>{3});
    kv.write(0, 3, values);
    EXPECT_EQ(read(0, 3), values);
  };
  copies();  // pins memory, which stays
  const size_t before = fake_cudart::num_calls();
  copies();
  const size_t num_calls = fake_cudart::num_calls() - before;
  ASSERT_GT(num_calls, 6u);
  for (size_t n = 1; n <= num_calls; ++n) {
    const size_t faults = fake_cudart::num_faults();
    fake_cudart::fail_call(n, cudaErrorInvalidValue);
    EXPECT_THROW(copies(), CudaError) << "call " << n << ", " << fake_cudart::last_fault();
    EXPECT_EQ(fake_cudart::num_faults(), faults + 1);
    EXPECT_NO_THROW(copies());
  }
}

// The order that KvStore promises: keys [kv head, token, head_dim], then values alike.
TEST_F(ModelKvTest, a_run_leaves_keys_and_values_of_the_plain_transformer) {
  const TinyModel tiny(Kind::kQwen, 2);
  make_model(tiny);
  start();
  const std::vector<int32_t> tokens = tiny.random_tokens(3 * kBlockTokens, 5);
  execute(1, {{.sequence = 1, .tokens = tokens}});
  const Batch batch = batch_of({{.sequence = 1, .tokens = tokens}});
  const auto at = [&](const std::vector<float>& values, size_t half, size_t head, size_t token,
                      size_t i) {
    return values[((half * 2 + head) * kBlockTokens + token) * 64 + i];
  };
  const TinyModel::KeysAndValues want = tiny.keys_and_values(tokens);
  for (size_t layer = 0; layer < 2; ++layer) {
    for (size_t token = 0; token < tokens.size(); ++token) {
      const auto values =
          read(static_cast<int32_t>(layer), batch.sequences[0].block_table[token / kBlockTokens]);
      for (size_t head = 0; head < 2; ++head) {
        for (size_t i = 0; i < 64; ++i) {
          const size_t slot = token % kBlockTokens;
          EXPECT_NEAR(at(values, 0, head, slot, i), want[layer].keys[token][head][i], 0.08);
          EXPECT_NEAR(at(values, 1, head, slot, i), want[layer].values[token][head][i], 0.08);
        }
      }
      if (HasFailure())
        return;
    }
  }
}

// As a hand-over between two workers copies it.
TEST_F(ModelKvTest, a_cache_carried_to_another_model_gives_the_bits_of_its_own) {
  const TinyModel tiny(Kind::kWindow, 3);
  const std::vector<int32_t> tokens = tiny.random_tokens(21, 5);
  const Part rest{0, first(tokens, 16), between(tokens, 16, 21)};
  const std::vector<int32_t> blocks = batch_of({rest}).sequences[0].block_table;
  make_model(tiny);
  start();
  execute(1, {{0, {}, first(tokens, 16)}});
  std::map<std::pair<int32_t, int32_t>, std::vector<float>> carried;
  for (int32_t layer = 0; layer < 3; ++layer) {
    for (size_t i = 0; i < 16 / kBlockTokens; ++i)
      carried[{layer, blocks[i]}] = read(layer, blocks[i]);
  }
  const auto own = execute(2, {rest});
  tear_down();
  make_model(tiny);
  start();
  EXPECT_NE(execute(1, {rest}), own) << "nothing there yet";
  for (const auto& [place, values] : carried)
    model_->kv()->write(place.first, place.second, values);
  EXPECT_EQ(execute(2, {rest}), own);
}

}  // namespace
}  // namespace flowprefill::testing
