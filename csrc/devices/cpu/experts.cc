#include "devices/cpu/experts.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "devices/cpu/buffer.h"
#include "devices/cpu/product_shares.h"
#include "devices/cpu/route.h"

namespace flowprefill {
namespace {

// Rows of one expert that are multiplied at once: they stay in L2 while blocks of weights pass.
constexpr int32_t kExpertRows = 256;
constexpr int64_t kMostBlocks = 8;  // of one expert that a member takes at once
constexpr int32_t kPairChunk = 16;  // rows that a member brings to their place at once
constexpr size_t kLine = 64;

// One slot of one row of a step.
struct Pair {
  int32_t row;  // of the batch
  int32_t slot;
};

// The slots of a step's rows, sorted by expert, and the input of each: T, or in the form that
// products of so many rows of this weight read.
struct SortedRows {
  int64_t program = -1;
  const Operator* op = nullptr;
  int32_t row_begin = 0;
  int32_t row_end = 0;
  std::vector<int32_t> first;     // [experts + 1] each one's first pair
  std::vector<Pair> pairs;        // of one expert in the order of the rows
  std::vector<int32_t> places;    // [rows, slots] which pair each is
  std::vector<size_t> offsets;    // [experts] where the input of its rows begins
  std::vector<size_t> row_bytes;  // [experts]
  Buffer input;

  const std::byte* input_at(int32_t expert, int32_t pair) const {
    const auto e = static_cast<size_t>(expert);
    return input.as<std::byte>() + offsets[e] + static_cast<size_t>(pair - first[e]) * row_bytes[e];
  }
};

// Blocks [first, last) of one expert; none where last <= first.
struct Blocks {
  int64_t first;
  int64_t last;
};

// Rows [begin, end) of the sorted pairs, all of one expert, and some of its blocks.
struct ExpertShare {
  int32_t expert;
  int32_t begin;
  int32_t end;
  Blocks blocks;
};

template <typename T>
class ExpertProduct {
 public:
  ExpertProduct(CpuActivations<T>& activations, const Operator& op, const Step& step, Team& team)
      : a_(activations),
        op_(op),
        step_(step),
        team_(team),
        linear_(activations.weights.matrix(op.weight)),
        is_gate_(op.epilogue == Epilogue::kGate),
        blocks_(linear_.blocks() / op.experts),
        begin_(step.part_begin),
        end_(step.is_whole() ? linear_.blocks() : step.part_end) {}

  void sort(SortedRows& sorted) {
    count(sorted);
    size_t bytes = 0;
    for (int32_t e = 0; e < op_.experts; ++e) {
      const auto i = static_cast<size_t>(e);
      const int32_t rows = sorted.first[i + 1] - sorted.first[i];
      const size_t prepared = linear_.prepared_row_bytes(rows);
      sorted.row_bytes[i] =
          prepared > 0 ? prepared : static_cast<size_t>(linear_.depth()) * sizeof(T);
      sorted.offsets[i] = bytes;
      bytes += (sorted.row_bytes[i] * static_cast<size_t>(rows) + kLine - 1) / kLine * kLine;
    }
    if (sorted.input.bytes() < bytes)
      sorted.input = Buffer(bytes);
    const int32_t rows = std::max(1, kPairChunk / op_.slots);
    team_.for_each((step_.rows() + rows - 1) / rows, [&](int64_t chunk) {
      const int32_t begin = step_.row_begin + static_cast<int32_t>(chunk) * rows;
      for (int32_t row = begin; row < std::min(begin + rows, step_.row_end); ++row)
        fill(sorted, row);
    });
  }

  // Every share writes its columns of its rows' slots.
  void gate(const SortedRows& sorted) {
    const std::vector<ExpertShare> shares = gate_shares(sorted);
    team_.for_each(static_cast<int64_t>(shares.size()), [&](int64_t i) {
      const ExpertShare& share = shares[static_cast<size_t>(i)];
      each_block(sorted, share, [&](const float* product, const Pair& pair, int64_t block) {
        const auto activate =
            op_.activation == Activation::kSilu ? row_kernels<T>().swiglu : row_kernels<T>().geglu;
        const int32_t width = a_.graph.output_of(op_).columns;
        T* out = a_.template at<T>(op_.output, step_, pair.row) +
                 int64_t{pair.slot} * (width / op_.slots) + block * (kPackColumns / 2);
        activate(product, kPackColumns, 1, kPackColumns / 2, out, width);
      });
      linear_.end_series();
    });
  }

  // Every share adds to its columns, for all experts one after another: so each sum has an order.
  void add(const SortedRows& sorted) {
    const ProductShares shares(0, blocks_, step_.rows(), team_.threads(), false);
    team_.for_each(shares.size(), [&](int64_t i) {
      const ProductShare mine = shares[i];
      for (int32_t e = 0; e < op_.experts; ++e) {
        const Blocks wanted = blocks_of(e);
        const Blocks blocks{std::max(mine.first, wanted.first), std::min(mine.last, wanted.last)};
        each_chunk(sorted, e, [&](int32_t begin, int32_t end) {
          each_block(sorted, {e, begin, end, blocks},
                     [this](const float* product, const Pair& pair, int64_t block) {
                       const float* route = a_.template at<float>(op_.route, step_, pair.row);
                       float* out = a_.template at<float>(op_.output, step_, pair.row) +
                                    block * kPackColumns;
                       row_kernels<T>().add_scaled(product, nullptr, kPackColumns, 0.0f,
                                                   route[op_.slots + pair.slot], out);
                     });
        });
      }
      linear_.end_series();
    });
  }

 private:
  // Of the expert's blocks those that are among the step's parts.
  Blocks blocks_of(int32_t expert) const {
    const int64_t first = expert * blocks_;
    return {std::clamp<int64_t>(begin_ - first, 0, blocks_),
            std::clamp<int64_t>(end_ - first, 0, blocks_)};
  }

  void count(SortedRows& sorted) {
    sorted.first.assign(static_cast<size_t>(op_.experts) + 1, 0);
    sorted.offsets.resize(static_cast<size_t>(op_.experts));
    sorted.row_bytes.resize(static_cast<size_t>(op_.experts));
    sorted.pairs.resize(static_cast<size_t>(step_.rows()) * static_cast<size_t>(op_.slots));
    sorted.places.resize(sorted.pairs.size());
    each_pair([&](int32_t expert, Pair) { ++sorted.first[static_cast<size_t>(expert) + 1]; });
    for (size_t e = 1; e < sorted.first.size(); ++e)
      sorted.first[e] += sorted.first[e - 1];
    std::vector<int32_t> next(sorted.first);
    auto place = sorted.places.begin();
    each_pair([&](int32_t expert, Pair pair) {
      *place = next[static_cast<size_t>(expert)]++;
      sorted.pairs[static_cast<size_t>(*place++)] = pair;
    });
  }

  template <typename Sink>
  void each_pair(const Sink& sink) {
    for (int32_t row = step_.row_begin; row < step_.row_end; ++row) {
      for (int32_t slot = 0; slot < op_.slots; ++slot)
        sink(expert_of({row, slot}), Pair{row, slot});
    }
  }
  int32_t expert_of(const Pair& pair) {
    return static_cast<int32_t>(a_.template at<float>(op_.route, step_, pair.row)[pair.slot]);
  }

  // Of the row, or of its slot.
  const T* input_of(const Pair& pair) {
    return a_.template at<T>(op_.input, step_, pair.row) +
           (is_gate_ ? 0 : pair.slot * linear_.depth());
  }

  // Brings what a row's experts multiply to its place; where they all multiply the row itself, it
  // is prepared for the first of them and copied for the others.
  void fill(SortedRows& sorted, int32_t row) {
    const int32_t* places =
        &sorted.places[static_cast<size_t>(row - step_.row_begin) * static_cast<size_t>(op_.slots)];
    const std::byte* prepared = nullptr;
    for (int32_t slot = 0; slot < op_.slots; ++slot) {
      const Pair pair{row, slot};
      const int32_t expert = expert_of(pair);
      const auto e = static_cast<size_t>(expert);
      auto* to = const_cast<std::byte*>(sorted.input_at(expert, places[slot]));
      if (linear_.prepared_row_bytes(sorted.first[e + 1] - sorted.first[e]) == 0) {
        std::memcpy(to, input_of(pair), sorted.row_bytes[e]);
      } else if (prepared != nullptr) {
        std::memcpy(to, prepared, sorted.row_bytes[e]);
      } else {
        linear_.prepare(1, input_of(pair), to);
        prepared = is_gate_ ? to : nullptr;
      }
    }
  }

  // The expert's rows in equal chunks: a matrix whose products of few rows differ gets few of them
  // only where there are no more.
  template <typename Sink>
  void each_chunk(const SortedRows& sorted, int32_t expert, const Sink& sink) const {
    const int32_t first = sorted.first[static_cast<size_t>(expert)];
    const int32_t rows = sorted.first[static_cast<size_t>(expert) + 1] - first;
    const int32_t chunks = (rows + kExpertRows - 1) / kExpertRows;
    const auto begin_of = [&](int32_t chunk) {
      return first + static_cast<int32_t>(int64_t{rows} * chunk / chunks);
    };
    for (int32_t chunk = 0; chunk < chunks; ++chunk)
      sink(begin_of(chunk), begin_of(chunk + 1));
  }

  // At least some shares for each member, so that they end together.
  std::vector<ExpertShare> gate_shares(const SortedRows& sorted) const {
    int64_t all = 0;
    for (int32_t e = 0; e < op_.experts; ++e) {
      const Blocks blocks = blocks_of(e);
      each_chunk(sorted, e, [&](int32_t, int32_t) { all += blocks.last - blocks.first; });
    }
    const int64_t wanted =
        std::clamp(all / (8 * int64_t{team_.threads()}), int64_t{1}, kMostBlocks);
    std::vector<ExpertShare> shares;
    for (int32_t e = 0; e < op_.experts; ++e) {
      const Blocks blocks = blocks_of(e);
      each_chunk(sorted, e, [&](int32_t begin, int32_t end) {
        for (int64_t block = blocks.first; block < blocks.last; block += wanted)
          shares.push_back({e, begin, end, {block, std::min(block + wanted, blocks.last)}});
      });
    }
    return shares;
  }

  // Hands every row of every block's product on, with where it belongs.
  template <typename Sink>
  void each_block(const SortedRows& sorted, const ExpertShare& share, const Sink& sink) const {
    thread_local std::vector<float> memory;
    float* const product = line_of(memory, static_cast<size_t>(kExpertRows) * kPackColumns);
    const int32_t rows = share.end - share.begin;
    const int64_t first = share.expert * blocks_;
    for (int64_t block = share.blocks.first; block < share.blocks.last; ++block) {
      linear_.multiply_block(first + block, first + share.blocks.last, rows,
                             sorted.input_at(share.expert, share.begin), product, kPackColumns,
                             false);
      for (int32_t r = 0; r < rows; ++r)
        sink(product + int64_t{r} * kPackColumns,
             sorted.pairs[static_cast<size_t>(share.begin) + static_cast<size_t>(r)], block);
    }
  }

  CpuActivations<T>& a_;
  const Operator& op_;
  const Step& step_;
  Team& team_;
  const Linear<T>& linear_;
  const bool is_gate_;
  const int64_t blocks_;  // of one expert
  const int64_t begin_;   // of the blocks of all experts, those of the step
  const int64_t end_;
};

}  // namespace

template <typename T>
void route(CpuActivations<T>& activations, const Operator& op, const Step& step, RowRange rows) {
  const int32_t experts = activations.graph.tensor(op.input).columns;
  for (int32_t row = rows.begin; row < rows.end; ++row) {
    route_row(activations.template at<float>(op.input, step, row), experts, op.slots,
              op.sums_to_one, activations.template at<float>(op.output, step, row));
  }
}

template <typename T>
void multiply_experts(CpuActivations<T>& activations, const Operator& op, const Step& step,
                      int64_t program, Team& team) {
  thread_local SortedRows sorted;
  ExpertProduct<T> product(activations, op, step, team);
  const bool is_held = sorted.program == program && sorted.op == &op &&
                       sorted.row_begin == step.row_begin && sorted.row_end == step.row_end;
  if (!is_held || step.part_begin == 0) {
    sorted.program = -1;  // of none, should there be no memory
    product.sort(sorted);
    sorted.program = program;
    sorted.op = &op;
    sorted.row_begin = step.row_begin;
    sorted.row_end = step.row_end;
  }
  if (op.epilogue == Epilogue::kGate)
    product.gate(sorted);
  else
    product.add(sorted);
}

template void route(CpuActivations<float>&, const Operator&, const Step&, RowRange);
template void route(CpuActivations<Bf16>&, const Operator&, const Step&, RowRange);
template void multiply_experts(CpuActivations<float>&, const Operator&, const Step&, int64_t,
                               Team&);
template void multiply_experts(CpuActivations<Bf16>&, const Operator&, const Step&, int64_t, Team&);

}  // namespace flowprefill
