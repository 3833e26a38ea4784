#include "devices/cpu/attention.h"

#include <algorithm>
#include <vector>

#include "devices/cpu/attender.h"

namespace flowprefill {
namespace {

constexpr int32_t kTargetRows = 96;  // query rows times heads per item
// An item of at most so many rows is shared out by spans if it is more than one of so many equal
// parts for each thread.
constexpr int32_t kSharedRows = 4;
constexpr int32_t kPartsPerThread = 4;

// An item that is shared out by spans, and where the softmax of its first span begins.
struct SharedItem {
  const AttentionItem* item;
  size_t softmaxes;
};

// What one thread takes at once: an item, or one span of a shared item.
struct Piece {
  const AttentionItem* item;
  int32_t span;    // -1: all
  size_t softmax;  // of the span
};

// How a team of threads shares the items out.
template <typename T>
class Sharing {
 public:
  Sharing(const AttentionArgs<T>& args, std::span<const AttentionItem> items, int32_t threads) {
    int64_t work = 0;
    for (const AttentionItem& item : items)
      work += Attender<T>(args, item).work();
    for (const AttentionItem& item : items) {
      const Attender<T> attender(args, item);
      const bool is_shared = threads > 1 && item.rows <= kSharedRows && attender.num_spans() > 1 &&
                             attender.work() * kPartsPerThread * threads > work;
      if (!is_shared) {
        pieces.push_back({&item, -1, 0});
        continue;
      }
      shared.push_back({&item, num_floats});
      for (int32_t span = 0; span < attender.num_spans(); ++span) {
        pieces.push_back({&item, span, num_floats});
        num_floats += attender.num_floats();
      }
    }
  }

  std::vector<Piece> pieces;
  std::vector<SharedItem> shared;
  size_t num_floats = 0;  // of all softmaxes over a span
};

}  // namespace

template <typename T>
void attend(const AttentionArgs<T>& args, std::span<const AttentionItem> items, Team& team) {
  thread_local std::vector<float> memory;
  const Sharing<T> sharing(args, items, team.threads());
  float* const softmaxes = line_of(memory, sharing.num_floats);
  team.for_each(static_cast<int64_t>(sharing.pieces.size()), [&](int64_t i) {
    const Piece& piece = sharing.pieces[static_cast<size_t>(i)];
    Attender<T> attender(args, *piece.item);
    if (piece.span < 0)
      attender.run();
    else
      attender.run_span(piece.span, softmaxes + piece.softmax);
  });
  team.for_each(static_cast<int64_t>(sharing.shared.size()), [&](int64_t i) {
    const SharedItem& shared = sharing.shared[static_cast<size_t>(i)];
    Attender<T>(args, *shared.item).merge_spans(softmaxes + shared.softmaxes);
  });
}

template void attend<float>(const AttentionArgs<float>&, std::span<const AttentionItem>, Team&);
template void attend<Bf16>(const AttentionArgs<Bf16>&, std::span<const AttentionItem>, Team&);

int32_t attention_item_rows(int32_t rows, int32_t heads_per_kv, int32_t kv_heads, int32_t threads) {
  const int32_t target = std::max(1, kTargetRows / heads_per_kv);
  for (int32_t size = std::min(target, rows) / 16 * 16; size >= 16; size -= 16) {
    const int32_t items = (rows + size - 1) / size * kv_heads;
    const int32_t rounds = (items + threads - 1) / threads;
    if (10 * items >= 9 * rounds * threads)  // else threads wait for the last ones
      return size;
  }
  const int32_t share = std::max(1, rows * kv_heads / (2 * threads));  // two items a thread
  const int32_t size = std::min({target, share, rows});
  return size > 16 ? size / 16 * 16 : size;
}

}  // namespace flowprefill
