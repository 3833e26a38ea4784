// few_rows_body(): a matrix product of at most 16 rows, bound by reading the weights. Launched by
// gemm_few_rows.cu, run on the host by tests/cpp/kernels.
//
// A block has 32 columns of d, so 32 rows of b. Its warps take turns along the depth, 64 elements
// (128 of e4m3) at a time, and their sums are added in shared memory, always in the same order:
// what an element's bits depend on are its row of a, its row of b and the depth. Products are by
// tensor cores, the weights as the operand with 16 rows: 1 to 8 rows of a cost the same, 9 to 16
// little more.
//
// A warp has two further steps, 8 KiB of weights, under way while it multiplies one, and two blocks
// fit a multiprocessor. They lie in shared memory, in a place of its own for each lane, so that no
// lane waits for another. The instruction multiplies any order of the depth as long as both
// operands have the same: so a lane copies 16 bytes in a row of each where its fragments would be
// four separate words, and reads them back as they are, without ldmatrix.
//
// E4m3 becomes f16 in registers, which is exact. Compute capability 9.0 has no instruction that
// multiplies e4m3 on a warp: the compiler would convert in the same way, and the rows once for each
// 16 rows of b.
#pragma once

#include "devices/cuda/kernels/gemm_args.h"
#include "devices/cuda/kernels/gemm_gate.h"
#include "devices/cuda/kernels/mma_layout.h"
#include "devices/cuda/kernels/thread.h"

namespace flowprefill {

constexpr int32_t kFewRowsColumns = 32;  // of d, by one block; gate and up alternate among them
constexpr int32_t kFewRowsWarps = 8;
constexpr int32_t kFewRowsThreads = kFewRowsWarps * 32;
constexpr int32_t kFewRowsStages = 3;  // steps that have room in shared memory
// Between the rows of sums in shared memory: a warp's stores meet no bank twice.
constexpr int32_t kFewRowsStride = kFewRowsColumns + 4;

// What is copied at once, and how much of it a lane has in one step.
using FewRowsPiece = Vec<uint32_t, 4>;
constexpr int32_t kFewRowsPieces = 8;

// The copies; when all are multiplied, the sums.
constexpr size_t kFewRowsSharedBytes =
    sizeof(FewRowsPiece) * kFewRowsThreads * kFewRowsPieces * kFewRowsStages;

// What is multiplied, by type.
FP_HD void few_rows_operands(const GemmArgs& args, const Bf16** a, const Bf16** b) {
  *a = args.a;
  *b = args.b;
}
FP_HD void few_rows_operands(const GemmArgs& args, const E4m3** a, const E4m3** b) {
  *a = args.fp8.a;
  *b = args.fp8.b;
}

// One warp's sums over its steps. Element: Bf16 or E4m3.
template <int kTiles, typename Element, class Thread>
class FewRowsWarp {
 public:
  FP_HD FewRowsWarp(const Thread& t, const GemmArgs& args, int32_t first_column)
      : t_(t), depth_(args.depth), k_(kDepth * t.warp() + kPiece * (t.lane() % 4)) {
    const Element* a;
    const Element* b;
    few_rows_operands(args, &a, &b);
    // Rows beyond the last of a or b are read as that one: their products are never stored.
    FP_UNROLL for (int j = 0; j < 4; ++j) {
      const int32_t column = smaller(first_column + t.lane() / 4 + 8 * j, args.columns - 1);
      b_[j] = b + column * args.ldb + k_;
    }
    FP_UNROLL for (int tile = 0; tile < kTiles; ++tile) {
      const int32_t row = smaller(args.row_begin + t.lane() / 4 + 8 * tile, args.row_end - 1);
      a_[tile] = a + row * args.lda + k_;
    }
  }

  FP_HD void run() {
    for (int32_t step = 0; step < kFewRowsStages - 1; ++step)
      start(step);
    t_.wait_for_predecessor();  // the weights are no kernel's; all else may be
    Rows even;
    Rows odd;
    load<0>(&even);
    load<1>(&odd);
    // The same number of turns for all lanes. Beyond the depth all is zero.
    for (int32_t begin = kDepth * t_.warp(); begin < depth_; begin += 2 * kTurn) {
      run_step(&even);
      run_step(&odd);
    }
    t_.wait_for_copies();
  }

  // To sums[8 * kTiles][kFewRowsStride].
  FP_HD void store_sums(const Thread& t, float* sums) const {
    FP_UNROLL for (int m = 0; m < 2; ++m) {
      FP_UNROLL for (int tile = 0; tile < kTiles; ++tile) {
        FP_UNROLL for (int i = 0; i < 4; ++i) {
          const int32_t row = 8 * tile + c_column(t.lane(), i);
          sums[row * kFewRowsStride + 16 * m + c_row(t.lane(), i)] = c_[m][tile][i];
        }
      }
    }
  }

 private:
  static constexpr bool kIsFp8 = sizeof(Element) == 1;
  static constexpr int32_t kPiece = sizeof(FewRowsPiece) / sizeof(Element);
  static constexpr int32_t kHalf = 4 * kPiece;  // of the depth, by the four lanes of a row
  static constexpr int32_t kDepth = 2 * kHalf;  // of one step of a warp
  static constexpr int32_t kTurn = kFewRowsWarps * kDepth;  // from step to step

  // A lane's piece of either half of a step.
  struct Rows {
    FewRowsPiece v[2][kTiles];
  };

  FP_HD FewRowsPiece* place(int32_t stage) const {
    return t_.template shared<FewRowsPiece>() + stage * kFewRowsPieces * kFewRowsThreads +
           t_.index();
  }

  // Starts the copy of the weights of the step that comes `ahead` of the one at k_.
  FP_HD void start(int32_t ahead) const {
    const int32_t stage = (stage_ + ahead) % kFewRowsStages;
    FP_UNROLL for (int half = 0; half < 2; ++half) {
      const int32_t offset = kTurn * ahead + kHalf * half;
      FP_UNROLL for (int j = 0; j < 4; ++j) {
        t_.copy_16(place(stage) + (4 * half + j) * kFewRowsThreads, b_[j] + offset,
                   k_ + offset < depth_);
      }
    }
    t_.end_copies();
  }
  template <int32_t kAhead>
  FP_HD void load(Rows* out) const {
    FP_UNROLL for (int half = 0; half < 2; ++half) {
      constexpr int32_t kOffset = kTurn * kAhead;
      FP_UNROLL for (int tile = 0; tile < kTiles; ++tile) {
        FewRowsPiece& piece = out->v[half][tile];
        piece = {};
        if (k_ + kOffset + kHalf * half < depth_)
          piece = *reinterpret_cast<const FewRowsPiece*>(a_[tile] + kOffset + kHalf * half);
      }
    }
  }

  // Multiplies the step at k_ by `rows`, and makes those the rows of the step after the next.
  FP_HD void run_step(Rows* rows) {
    start(kFewRowsStages - 1);
    t_.template wait_for_copies_but<kFewRowsStages - 1>();
    const FewRowsPiece* copied = place(stage_);
    FP_UNROLL for (int half = 0; half < 2; ++half) {
      FewRowsPiece weights[4];
      FP_UNROLL for (int j = 0; j < 4; ++j) weights[j] = copied[(4 * half + j) * kFewRowsThreads];
      if constexpr (kIsFp8)
        multiply_codes(weights, rows->v[half]);
      else
        multiply(weights, rows->v[half]);
      if (kIsFp8 && kTiles > 1)
        t_.sync_warp();  // the compiler has no registers for both halves at once
    }
    load<2>(rows);
    k_ += kTurn;
    FP_UNROLL for (int j = 0; j < 4; ++j) b_[j] += kTurn;
    FP_UNROLL for (int tile = 0; tile < kTiles; ++tile) a_[tile] += kTurn;
    stage_ = (stage_ + 1) % kFewRowsStages;
  }

  // Words 0 and 1 of all four lanes of a row are one 16 of the depth, 2 and 3 the other.
  FP_HD void multiply(const FewRowsPiece (&b)[4], const FewRowsPiece (&a)[kTiles]) {
    FP_UNROLL for (int word = 0; word < 4; word += 2) {
      FP_UNROLL for (int m = 0; m < 2; ++m) {
        const auto& low = b[2 * m].v;
        const auto& high = b[2 * m + 1].v;
        const uint32_t weights[4] = {low[word], high[word], low[word + 1], high[word + 1]};
        FP_UNROLL for (int tile = 0; tile < kTiles; ++tile) {
          t_.multiply_add(c_[m][tile], weights, a[tile].v[word], a[tile].v[word + 1]);
        }
      }
    }
  }

  // A word of all four lanes of a row, four codes each, is one 16 of the depth.
  FP_HD void multiply_codes(const FewRowsPiece (&b)[4], const FewRowsPiece (&a)[kTiles]) {
    FP_UNROLL for (int word = 0; word < 4; ++word) {
      uint32_t rows[kTiles][2];
      FP_UNROLL for (int tile = 0; tile < kTiles; ++tile) widen_to_f16(a[tile].v[word], rows[tile]);
      FP_UNROLL for (int m = 0; m < 2; ++m) {
        uint32_t low[2];
        uint32_t high[2];
        widen_to_f16(b[2 * m].v[word], low);
        widen_to_f16(b[2 * m + 1].v[word], high);
        const uint32_t weights[4] = {low[0], high[0], low[1], high[1]};
        FP_UNROLL for (int tile = 0; tile < kTiles; ++tile)
            t_.multiply_add_f16(c_[m][tile], weights, rows[tile][0], rows[tile][1]);
      }
    }
  }

  const Thread& t_;
  int32_t depth_;
  int32_t stage_ = 0;    // where the weights of the step at k_ lie
  int32_t k_;            // this lane's, of the step that is multiplied next
  const Element* b_[4];  // at k_
  const Element* a_[kTiles];
  float c_[2][kTiles][4] = {};
};

// scale * sums (+ bias) (+ d), of two columns, to d.
template <typename Output>
FP_HD void store_few(const GemmArgs& args, int32_t row, int32_t column, const float (&sums)[2]) {
  auto* at = reinterpret_cast<Vec<Output, 2>*>(args.first_d<Output>() + row * args.ldd + column);
  Vec<Output, 2> d = {};
  if (args.adds_to_d)
    d = *at;
  FP_UNROLL for (int i = 0; i < 2; ++i) {
    float value = sums[i] * args.scale;
    if (args.bias != nullptr)
      value += args.bias[column + i];
    if (args.adds_to_d)
      value += widen(d.v[i]);
    store(value, &d.v[i]);
  }
  *at = d;
}

// Grid: x, columns / 32 rounded up. kFewRowsThreads threads, kFewRowsSharedBytes of shared memory.
// args: checked by check_tile(), at most 8 * kTiles rows; Element: what is multiplied. May be
// launched while the kernel before it runs, unless args.b_is_made: the first steps' weights are
// under way when that one ends.
template <int kTiles, typename Element, class Thread>
FP_HD void few_rows_body(Thread t, const GemmArgs& args) {
  constexpr int32_t kSums = 8 * kTiles * kFewRowsStride;
  static_assert(sizeof(float) * kFewRowsWarps * kSums <= kFewRowsSharedBytes);
  float* sums = t.template shared<float>();
  t.let_successor_start();
  {
    FewRowsWarp<kTiles, Element, Thread> warp(t, args, kFewRowsColumns * t.block_x());
    warp.run();
    t.recompute();
    t.sync();  // all are multiplied
    warp.store_sums(t, sums + t.warp() * kSums);
  }
  t.sync();
  const int32_t first_column = kFewRowsColumns * t.block_x();
  constexpr int32_t kPairs = kFewRowsColumns / 2;
  const int32_t row = t.index() / kPairs;
  const int32_t pair = 2 * (t.index() % kPairs);
  const int32_t column = first_column + pair;
  if (row >= args.rows() || column >= args.columns)
    return;
  float total[2] = {};
  FP_UNROLL for (int warp = 0; warp < kFewRowsWarps; ++warp) {
    const auto part =
        *reinterpret_cast<const Vec<float, 2>*>(sums + warp * kSums + row * kFewRowsStride + pair);
    total[0] += part.v[0];
    total[1] += part.v[1];
  }
  if (sizeof(Element) == 1 && args.fp8.a_scales != nullptr) {
    const float row_scale = args.fp8.a_scales[args.row_begin + row];
    FP_UNROLL for (int i = 0; i < 2; ++i) total[i] *= row_scale * args.fp8.b_scales[column + i];
  }
  if (args.is_gated) {
    const GatedOutput out{args.first_d<Bf16>(), args.ldd,     args.bias,
                          args.rows(),          args.columns, args.is_gelu};
    store_gated(out, row, column, total);
  } else if (args.output == GemmOutput::kFloat) {
    store_few<float>(args, row, column, total);
  } else {
    store_few<Bf16>(args, row, column, total);
  }
}

}  // namespace flowprefill
