// few_rows_body(): a matrix product of at most 16 rows, bound by reading the weights. Launched by
// gemm_few_rows.cu, run on the host by tests/cpp/kernels.
//
// As many blocks as the device holds take units of FewRowsForm::kColumns columns of d, so rows of
// b, in turns. A block's warps take turns along the depth, 128 bytes at a time, and their sums are
// added in shared memory, always in the same order: what an element's bits depend on are its row of
// a, its row of b and the depth. Products are by tensor cores, the weights as the operand with 16
// rows: 1 to 8 rows of a cost the same, 9 to 16 little more.
//
// Reading the weights is what takes time. Eight lanes copy 128 bytes in a row, a whole line of the
// cache: in pieces of 64 an H200 brings a fifth less. A warp copies into a ring of its own in
// shared memory and waits for other warps where sums are added only; the ring goes on to the next
// unit meanwhile, so the memory is not idle there. The instruction multiplies any order of the
// depth as long as both operands have the same: so a lane reads 16 bytes in a row of each where its
// fragments would be four separate words, without ldmatrix.
//
// E4m3 becomes f16 in registers, which is exact. Compute capability 9.0 has no instruction that
// multiplies e4m3 on a warp: the compiler would convert in the same way, and the rows once for each
// 16 rows of b.
#pragma once

#include "devices/cuda/kernels/fused_product_body.h"
#include "devices/cuda/kernels/gemm_few_rows_epilogue.h"
#include "devices/cuda/kernels/mma_layout.h"
#include "devices/cuda/kernels/thread.h"

namespace flowprefill {

constexpr int32_t kFewRowsWarps = 8;
constexpr int32_t kFewRowsThreads = kFewRowsWarps * 32;
constexpr int32_t kFewRowsBlocks = 2;       // of a multiprocessor
constexpr int32_t kFewRowsStepBytes = 128;  // of each row of b, that a warp copies at once

// What a lane copies or reads at once.
using FewRowsPiece = Vec<uint32_t, 4>;

// How a block takes its work; 8 * kTiles rows of a at most.
template <int kTilesOf>
struct FewRowsForm {
  static constexpr int kTiles = kTilesOf;
  // Of d, at a time; gate and up alternate among them. Narrow units spread evenly over the blocks;
  // more rows of a, which each unit reads anew, want wider ones.
  static constexpr int32_t kColumns = 16 * kTiles;
  // Steps that have room in shared memory: two blocks have 128 KiB under way on a multiprocessor.
  static constexpr int32_t kStages = kTiles == 1 ? 5 : 3;
  static constexpr int32_t kStepPieces = kColumns * kFewRowsStepBytes / 16;  // of a warp
  // Between the rows of sums in shared memory: a warp's stores meet no bank twice.
  static constexpr int32_t kStride = kColumns + 4;
  static constexpr size_t kSharedBytes =
      sizeof(FewRowsPiece) * kFewRowsWarps * kStepPieces * kStages;
  // A warp's sums lie where its last step's weights were.
  static_assert(size_t{8} * kTiles * kStride * sizeof(float) <= kStepPieces * sizeof(FewRowsPiece));
  static_assert(8 * kTiles * kColumns / 2 <= kFewRowsThreads);
};

// Which weights are multiplied, by type.
FP_HD const Bf16* few_rows_weights(const GemmArgs& args, const Bf16* /*type*/) {
  return args.b;
}
FP_HD const E4m3* few_rows_weights(const GemmArgs& args, const E4m3* /*type*/) {
  return args.fp8.b;
}
// And which rows.
FP_HD const Bf16* few_rows_operand(const GemmArgs& args, const Bf16* /*type*/) {
  return args.a;
}
FP_HD const E4m3* few_rows_operand(const GemmArgs& args, const E4m3* /*type*/) {
  return args.fp8.a;
}

// One warp's steps. Element: Bf16 or E4m3.
template <class Form, typename Element, bool kRopes, class Thread>
class FewRowsWarp {
 public:
  static constexpr int32_t kFirst = Form::kStages - 1;  // steps that there is room for

  FP_HD FewRowsWarp(const Thread& t, const FusedProduct& args)
      : t_(t),
        depth_(args.product.depth),
        columns_(args.product.columns),
        head_dim_(args.rope.head_dim),
        ldb_(args.product.ldb),
        b_(few_rows_weights(args.product, static_cast<const Element*>(nullptr))),
        unit_(t.block_x()) {
    turns_ = 2 * ((depth_ + 2 * kTurn - 1) / (2 * kTurn));
    from_unit();
  }

  // The copies of the first steps [begin, end), at most kFirst of them.
  FP_HD void start_first(int32_t begin, int32_t end) {
    for (int32_t step = begin; step < end; ++step)
      start(step);
  }
  // Rows [begin, end) of `a` are multiplied; those of the first steps are loaded.
  FP_HD void take_rows(const Element* a, int64_t lda, int32_t begin, int32_t end) {
    // Rows beyond the last are read as that one: their products are never stored.
    FP_UNROLL for (int tile = 0; tile < kTiles; ++tile) {
      const int32_t row = smaller(begin + t_.lane() / 4 + 8 * tile, end - 1);
      a_[tile] = a + row * lda + kDepth * t_.warp() + kPiece * (t_.lane() % 4);
    }
    load(0, &even_);
    load(1, &odd_);
  }

  // All steps of one unit of columns. The same number for all warps; beyond the depth all is zero.
  FP_HD void run() {
    FP_UNROLL for (int m = 0; m < kHalves; ++m) {
      FP_UNROLL for (int tile = 0; tile < kTiles; ++tile) {
        FP_UNROLL for (int i = 0; i < 4; ++i) c_[m][tile][i] = 0;
      }
    }
    for (int32_t turn = 0; turn < turns_; turn += 2) {
      run_step(turn, &even_);
      run_step(turn + 1, &odd_);
    }
    t_.sync_warp();  // the last step is read
  }

  // The sums' place: [8 * kTiles][kStride], of warp `warp` after run().
  FP_HD float* sums(int32_t warp) const {
    return reinterpret_cast<float*>(place(before(stage_), warp));
  }
  FP_HD void store_sums() const {
    float* out = sums(t_.warp());
    FP_UNROLL for (int m = 0; m < kHalves; ++m) {
      FP_UNROLL for (int tile = 0; tile < kTiles; ++tile) {
        FP_UNROLL for (int i = 0; i < 4; ++i) {
          const int32_t row = 8 * tile + c_column(t_.lane(), i);
          out[row * Form::kStride + 16 * m + c_row(t_.lane(), i)] = c_[m][tile][i];
        }
      }
    }
  }

 private:
  static constexpr int kTiles = Form::kTiles;
  static constexpr int32_t kStages = Form::kStages;
  static constexpr int kHalves = Form::kColumns / 16;  // operands of the weights in a step
  static constexpr bool kIsFp8 = sizeof(Element) == 1;
  static constexpr int32_t kPiece = sizeof(FewRowsPiece) / sizeof(Element);
  static constexpr int32_t kHalf = 4 * kPiece;  // of the depth, by the four lanes of a row
  static constexpr int32_t kDepth = 2 * kHalf;  // of one step of a warp
  static constexpr int32_t kTurn = kFewRowsWarps * kDepth;  // from step to step
  static_assert(kDepth * sizeof(Element) == kFewRowsStepBytes);

  // A lane's piece of either half of a step.
  struct Rows {
    FewRowsPiece v[2][kTiles];
  };

  FP_HD static int32_t before(int32_t stage) { return stage == 0 ? kStages - 1 : stage - 1; }
  FP_HD FewRowsPiece* place(int32_t stage, int32_t warp) const {
    return t_.template shared<FewRowsPiece>() + (stage * kFewRowsWarps + warp) * Form::kStepPieces;
  }

  // The row of b that is the unit's column `column`.
  FP_HD int32_t column_of(int32_t unit, int32_t column) const {
    if constexpr (!kRopes)
      return Form::kColumns * unit + column;
    const bool is_high = column >= kRopePairs;  // turns with a lower one
    return RopeColumns(unit, head_dim_).low + column + (is_high ? head_dim_ / 2 - kRopePairs : 0);
  }
  // Where the copies of unit_ begin: of four rows in turn, eight lanes for each.
  FP_HD void from_unit() {
    int32_t column = Form::kColumns * unit_ + t_.lane() / 8;
    rows_left_ = columns_ - column;
    if constexpr (kRopes)  // heads are whole units: all of a unit's columns are there, or none
      column = RopeColumns(unit_, head_dim_).low + t_.lane() / 8;
    k_ = kDepth * t_.warp() + kPiece * (t_.lane() % 8);
    from_ = b_ + column * ldb_ + k_;
  }
  // Columns from a lane's first to its i-th, of four in turn.
  FP_HD int32_t columns_to(int i) const {
    const int32_t column = 4 * i;
    return kRopes && column >= kRopePairs ? column - kRopePairs + head_dim_ / 2 : column;
  }

  // Starts the copy of the next step's weights to `stage`. Pieces of odd rows lie in the other half
  // of their line: the eight lanes that read two half rows at once meet no bank twice.
  FP_HD void start(int32_t stage) {
    const int32_t row = t_.lane() / 8;
    FewRowsPiece* to = place(stage, t_.warp()) + 8 * row + (t_.lane() % 8 ^ row % 2 * 4);
    FP_UNROLL for (int i = 0; i < Form::kColumns / 4; ++i) {
      t_.copy_16(to + 32 * i, from_ + columns_to(i) * ldb_, k_ < depth_ && 4 * i < rows_left_);
    }
    t_.end_copies();
    k_ += kTurn;
    from_ += kTurn;
    if (++started_ == turns_) {
      started_ = 0;
      unit_ += t_.grid_x();
      from_unit();
    }
  }
  // The rows of the step `turn` of a unit.
  FP_HD void load(int32_t turn, Rows* out) const {
    const int32_t k = kTurn * (turn < turns_ ? turn : turn - turns_);
    const int32_t left = depth_ - kDepth * t_.warp() - kPiece * (t_.lane() % 4) - k;
    FP_UNROLL for (int half = 0; half < 2; ++half) {
      FP_UNROLL for (int tile = 0; tile < kTiles; ++tile) {
        FewRowsPiece& piece = out->v[half][tile];
        piece = {};
        if (kHalf * half < left)
          piece = *reinterpret_cast<const FewRowsPiece*>(a_[tile] + k + kHalf * half);
      }
    }
  }

  // Multiplies the step `turn` by `rows`, and makes those the rows of the step after the next.
  FP_HD void run_step(int32_t turn, Rows* rows) {
    t_.template wait_for_copies_but<kStages - 2>();
    t_.sync_warp();  // all lanes' copies are there, and the step before is read
    start(before(stage_));
    const int32_t row = t_.lane() / 4;
    const int32_t first = 8 * row + (t_.lane() % 4 ^ row % 2 * 4);
    const FewRowsPiece* copied = place(stage_, t_.warp());
    FP_UNROLL for (int half = 0; half < 2; ++half) {
      FewRowsPiece weights[2 * kHalves];
      FP_UNROLL for (int j = 0; j < 2 * kHalves; ++j) weights[j] =
          copied[64 * j + (first ^ 4 * half)];
      if constexpr (kIsFp8)
        multiply_codes(weights, rows->v[half]);
      else
        multiply(weights, rows->v[half]);
      if (kIsFp8 && kTiles > 1)
        t_.sync_warp();  // the compiler has no registers for both halves at once
    }
    load(turn + 2, rows);
    stage_ = stage_ + 1 == kStages ? 0 : stage_ + 1;
  }

  // Words 0 and 1 of all four lanes of a row are one 16 of the depth, 2 and 3 the other.
  FP_HD void multiply(const FewRowsPiece (&b)[2 * kHalves], const FewRowsPiece (&a)[kTiles]) {
    FP_UNROLL for (int word = 0; word < 4; word += 2) {
      FP_UNROLL for (int m = 0; m < kHalves; ++m) {
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
  FP_HD void multiply_codes(const FewRowsPiece (&b)[2 * kHalves], const FewRowsPiece (&a)[kTiles]) {
    FP_UNROLL for (int word = 0; word < 4; ++word) {
      uint32_t rows[kTiles][2];
      FP_UNROLL for (int tile = 0; tile < kTiles; ++tile) widen_to_f16(a[tile].v[word], rows[tile]);
      FP_UNROLL for (int m = 0; m < kHalves; ++m) {
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
  const int32_t depth_;
  const int32_t columns_;
  const int32_t head_dim_;  // where heads turn
  const int64_t ldb_;
  const Element* const b_;
  const Element* a_[kTiles];
  int32_t turns_;  // steps of a unit, even
  // The step that is copied next: its unit, how many of that are started, where this lane's pieces
  // lie, at which depth, and how many rows are left from the lane's first on.
  int32_t unit_;
  int32_t started_ = 0;
  const Element* from_;
  int32_t k_;
  int32_t rows_left_;
  int32_t stage_ = 0;  // of the step that is multiplied next; the next copy goes to the one before
  Rows even_;
  Rows odd_;
  float c_[kHalves][kTiles][4];
};

// Grid: x, at most as many as there are units of FewRowsForm<kTiles>::kColumns columns.
// kFewRowsThreads threads, kSharedBytes of that form, and normed_bytes() where rows are normed
// (kNorms, as kRopes what args say too).
// args: checked by check_tile() or, where something is fused, check(); at most 8 * kTiles rows;
// Element: what is multiplied. May be launched while the kernel before it runs, unless b_is_made:
// the first steps' weights are under way when that one ends.
template <int kTiles, typename Element, bool kNorms, bool kRopes, class Thread>
FP_HD void few_rows_body(Thread t, const FusedProduct& fused) {
  using Form = FewRowsForm<kTiles>;
  constexpr int32_t kPairs = Form::kColumns / 2;
  static_assert(!kRopes || kPairs == kRopePairs);
  static_assert(kNormSumsBytes == kFewRowsWarps * sizeof(float));
  const GemmArgs& args = fused.product;
  const int32_t row = t.index() / kPairs;
  const int32_t pair = t.index() % kPairs;
  RopePair rope(fused.rope, kRopes ? row : INT32_MAX, pair);  // behind weights it would take long
  FewRowsWarp<Form, Element, kRopes, Thread> warp(t, fused);
  // What comes after weights waits for them: so a row that is to be normed comes in between.
  constexpr int32_t kFirst = decltype(warp)::kFirst;
  constexpr int32_t kEarly = kNorms ? kFirst / 2 : kFirst;
  warp.start_first(0, kEarly);
  t.wait_for_predecessor();  // the weights and the inputs are no kernel's; all else may be
  if constexpr (kNorms) {
    unsigned char* behind_ring = t.template shared<unsigned char>() + Form::kSharedBytes;
    const Bf16* normed =
        norm_rows(t, fused, behind_ring, [&] { warp.start_first(kEarly, kFirst); });
    warp.take_rows(normed, args.depth, 0, args.rows());
  } else {
    warp.take_rows(few_rows_operand(args, static_cast<const Element*>(nullptr)), args.lda,
                   args.row_begin, args.row_end);
  }
  rope.find();
  const int32_t first_of_pair = kRopes ? pair : 2 * pair;
  for (int32_t first = Form::kColumns * t.block_x(); first < args.columns;
       first += Form::kColumns * t.grid_x()) {
    const bool is_mine = row < args.rows() && first + first_of_pair < args.columns;
    FewRowsFactors factors;
    if (is_mine) {  // they arrive while the weights do
      if constexpr (kRopes)
        rope.load(first / Form::kColumns);
      else
        factors = load_factors<Element>(args, row, first + first_of_pair);
    }
    warp.run();
    warp.store_sums();
    t.recompute();  // or a register too many lives on from before the sums
    t.sync();
    float total[2] = {};
    if (is_mine) {
      FP_UNROLL for (int i = 0; i < kFewRowsWarps; ++i) {
        const float* part = warp.sums(i) + row * Form::kStride + first_of_pair;
        if constexpr (kRopes) {
          total[0] += part[0];
          total[1] += part[kPairs];
        } else {
          const auto both = *reinterpret_cast<const Vec<float, 2>*>(part);
          total[0] += both.v[0];
          total[1] += both.v[1];
        }
      }
    }
    t.sync();  // the sums' place may be filled again
    if (!is_mine)
      continue;
    if constexpr (kRopes)
      rope.store_sums(first / Form::kColumns, total);
    else
      finish_few(args, row, first + first_of_pair, total, factors);
  }
  t.wait_for_copies();
}

}  // namespace flowprefill
