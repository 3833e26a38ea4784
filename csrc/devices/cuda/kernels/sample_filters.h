// Which of a row's tokens top_k and top_p leave, by passes over the row: sums by bins of logits
// find the bin with the threshold, a list of its tokens in shared memory the threshold itself, and,
// where even that is too long, sums by the bits of the logits. And the token where sums of the row
// pass a value. Used by sample_body.h.
#pragma once

#include "devices/cuda/kernels/sample_row.h"

namespace flowprefill {

// A token in a list. Keys order tokens from the least likely, and equal ones from the highest id.
struct alignas(16) Candidate {
  uint64_t key;
  uint64_t counts;

  FP_HD uint32_t order() const { return static_cast<uint32_t>(key >> 32); }
  FP_HD int32_t id() const { return static_cast<int32_t>(~static_cast<uint32_t>(key)); }
};
FP_HD uint64_t key_of(float logit, int32_t id) {
  return static_cast<uint64_t>(order_of(logit)) << 32 | ~static_cast<uint32_t>(id);
}

// Shared memory of a block. Sums by bins and the list take turns in one place.
struct SampleScratch {
  uint32_t* bins;    // [2, kBins] the lower and upper words of sums
  Candidate* list;   // [threads]
  uint64_t* sums;    // [kSumWords]
  uint64_t* values;  // [2] what one thread tells all
  int32_t* index;    // likewise
  uint32_t* counter;
  float* largest;  // [kTilesOfThread, threads] of tiles
};

constexpr int32_t kBinBytes = 2 * kBins * static_cast<int32_t>(sizeof(uint32_t));
constexpr int32_t kSumBytes = (kSumWords + 3) * static_cast<int32_t>(sizeof(uint64_t));
static_assert(kBinBytes >= 1024 * static_cast<int32_t>(sizeof(Candidate)));

constexpr int32_t sample_shared_bytes(int32_t threads) {
  return kBinBytes + kSumBytes + kTilesOfThread * threads * static_cast<int32_t>(sizeof(float));
}

template <class Thread>
FP_HD SampleScratch scratch_of(const Thread& t) {
  auto* bytes = t.template shared<unsigned char>();
  auto* sums = reinterpret_cast<uint64_t*>(bytes + kBinBytes);
  auto* words = reinterpret_cast<uint32_t*>(sums + kSumWords + 2);
  return {.bins = reinterpret_cast<uint32_t*>(bytes),
          .list = reinterpret_cast<Candidate*>(bytes),
          .sums = sums,
          .values = sums + kSumWords,
          .index = reinterpret_cast<int32_t*>(words),
          .counter = words + 1,
          .largest = reinterpret_cast<float*>(bytes + kBinBytes + kSumBytes)};
}

// ---- sums by bins

template <class Thread>
FP_HD void clear_bins(const Thread& t, const SampleScratch& s) {
  for (int32_t i = t.index(); i < 2 * kBins; i += t.count())
    s.bins[i] = 0;
  t.sync();
}

template <class Thread>
FP_HD void add_to_bin(const Thread& t, const SampleScratch& s, int32_t bin, uint64_t value) {
  const auto low = static_cast<uint32_t>(value);
  const uint32_t before = t.add(s.bins + bin, low);
  const uint32_t high = static_cast<uint32_t>(value >> 32) + (before + low < before ? 1 : 0);
  if (high != 0)
    t.add(s.bins + kBins + bin, high);
}

// The first bin with which the sum of bins reaches `wanted`, and the sums before and with it; -1
// and the sum of all, twice, if none does.
struct FoundBin {
  int32_t bin;
  uint64_t before;
  uint64_t with;
  uint64_t wanted;
};

// Of the bins that all threads have added to; wanted_of(sum of all bins) is at least 1.
template <class Thread, class Wanted>
FP_HD FoundBin find_bin(const Thread& t, const SampleScratch& s, const Wanted& wanted_of) {
  t.sync();
  const auto value = [&s](int32_t bin) {
    return static_cast<uint64_t>(s.bins[kBins + bin]) << 32 | s.bins[bin];
  };
  const int32_t each = (kBins - 1) / t.count() + 1;
  const int32_t begin = smaller(t.index() * each, kBins);
  const int32_t end = smaller(begin + each, kBins);
  uint64_t mine = 0;
  for (int32_t bin = begin; bin < end; ++bin)
    mine += value(bin);
  uint64_t running = mine;
  const uint64_t total = block_running_sum(t, &running, s.sums);
  const uint64_t wanted = wanted_of(total);
  if (wanted > total)
    return {-1, total, total, wanted};
  uint64_t sum = running - mine;
  if (sum < wanted && wanted <= running) {  // one thread
    int32_t bin = begin;
    while (sum + value(bin) < wanted)
      sum += value(bin++);
    *s.index = bin;
    s.values[0] = sum;
    s.values[1] = sum + value(bin);
  }
  t.sync();
  return {*s.index, s.values[0], s.values[1], wanted};
}

// Adds what tokens count for to bins, bin_of(logit), of those that are left; below 0: to none.
template <class Thread, class BinOf>
FP_HD void add_row_to_bins(const Thread& t, Counted counted, const SampledRow& row,
                           const SampleScratch& s, int32_t last, const BinOf& bin_of) {
  clear_bins(t, s);
  // Neighbours in one bin are added at once: equal logits would all wait for the same word.
  int32_t bin = -1;
  uint64_t sum = 0;
  visit_groups(t, row, s.largest, last, [&](const float(&logits)[kGroup], int32_t group) {
    FP_UNROLL for (int32_t i = 0; i < kGroup; ++i) {
      const int32_t its = bin_of(logits[i]);
      const Parts parts = row.parts(logits[i], id_of(t, row, group, i));
      const uint64_t counts = counts_of(counted, parts).value();
      if (its < 0 || counts == 0)
        continue;
      if (its != bin && sum != 0) {
        add_to_bin(t, s, bin, sum);
        sum = 0;
      }
      bin = its;
      sum += counts;
    }
    return true;
  });
  if (sum != 0)
    add_to_bin(t, s, bin, sum);
}

// ---- lists

// Lists the tokens that are left in bins [first, last]. Returns how many they are; if more than
// threads, the list has some of them and the number is too small.
template <class Thread>
FP_HD int32_t fill_list(const Thread& t, Counted counted, const SampledRow& row,
                        const SampleScratch& s, int32_t first, int32_t last) {
  const auto room = static_cast<uint32_t>(t.count());
  if (t.index() == 0)
    *s.counter = 0;
  t.sync();  // all have read the bins, which lie in the same place
  visit_groups(t, row, s.largest, last, [&](const float(&logits)[kGroup], int32_t group) {
    bool is_full = false;
    FP_UNROLL for (int32_t i = 0; i < kGroup; ++i) {
      const int32_t bin = row.bin(logits[i]);
      if (bin < first || bin > last || is_full)
        continue;
      const int32_t id = id_of(t, row, group, i);
      const Parts parts = row.parts(logits[i], id);
      if ((parts.high | parts.low) == 0)
        continue;
      const uint32_t at = t.add(s.counter, 1);
      is_full = at >= room;
      if (!is_full)
        s.list[at] = {key_of(logits[i], id), counts_of(counted, parts).value()};
    }
    return !is_full;
  });
  t.sync();
  return static_cast<int32_t>(*s.counter);
}

// How many tokens of the list are more likely than this thread's, and what they count for.
struct Above {
  int32_t tokens = 0;
  uint64_t count = 0;
};
FP_HD Above above(const Candidate* list, int32_t n, uint64_t key) {
  Above out;
  for (int32_t i = 0; i < n; ++i) {
    const Candidate other = list[i];
    out.tokens += other.key > key ? 1 : 0;
    out.count += other.key > key ? other.counts : 0;
  }
  return out;
}

// ---- thresholds and drawing by passes over the row

// Logit i of the row in all threads, of(logit, id) adding up to more than target_of(sum of all)
// with it; the sum is above that.
template <class Thread, class Of, class TargetOf>
FP_HD int32_t find_in_row(const Thread& t, const SampledRow& row, const SampleScratch& s,
                          const Of& of, const TargetOf& target_of) {
  uint64_t mine = 0;
  visit_groups(t, row, s.largest, kLastBin, [&](const float(&logits)[kGroup], int32_t group) {
    Parts sum;
    const auto take = [&sum](const Parts& parts) {
      sum.high += parts.high;
      sum.low += parts.low;
    };
    if (row.is_cut()) {
      FP_UNROLL for (int32_t i = 0; i < kGroup; ++i)
          take(of(row.parts(logits[i], id_of(t, row, group, i)), logits[i]));
    } else {
      FP_UNROLL for (int32_t i = 0; i < kGroup; ++i) take(of(row.parts(logits[i]), logits[i]));
    }
    mine += sum.value();
    return true;
  });
  // The warp in whose part of the row it is; then all threads look there, four logits each.
  const uint64_t of_warp = warp_sum(t, mine);
  uint64_t running = t.lane() == 0 ? of_warp : 0;
  const uint64_t total = block_running_sum(t, &running, s.sums);
  uint64_t target = target_of(total);
  if (t.lane() == 0 && running - of_warp <= target && target < running) {
    *s.index = t.warp();
    s.values[0] = running - of_warp;
  }
  t.sync();
  target -= s.values[0];
  for (int32_t id = *s.index * row.groups * kGroupOfWarp + t.index() * 4;; id += t.count() * 4) {
    uint64_t counts[4];
    uint64_t sum = 0;
    FP_UNROLL for (int32_t i = 0; i < 4; ++i) {
      const float logit = id + i < row.width ? row.logits[id + i] : minus_infinity();
      counts[i] = of(row.parts(logit, id + i), logit).value();
      sum += counts[i];
    }
    running = sum;
    const uint64_t of_all = block_running_sum(t, &running, s.sums);  // all have read the index
    uint64_t before = running - sum;
    if (before <= target && target < running) {
      int32_t at = 0;
      FP_UNROLL for (int32_t i = 0; i < 3; ++i) {
        before += counts[i];
        at += before <= target ? 1 : 0;
      }
      *s.index = id + at;
    }
    if (target < of_all)  // the same in all threads
      break;
    target -= of_all;
  }
  t.sync();
  return *s.index;
}

// The threshold among the tokens of a bin that are too many for a list, by the bits of their
// logits. wanted: what they have to count for.
template <class Thread>
FP_HD void cut_by_bits(const Thread& t, Counted counted, int32_t bin, uint64_t wanted,
                       SampledRow* row, const SampleScratch& s) {
  uint32_t order = 0;
  FP_ROLLED for (int pass = 0; pass < 3; ++pass) {  // 10, 11 and 11 bits
    const int shift = pass == 0 ? 22 : pass == 1 ? 11 : 0;
    const uint32_t known = pass == 0 ? 0 : ~0u << (shift + 11);
    add_row_to_bins(t, counted, *row, s, bin, [&](float logit) {
      const uint32_t its = order_of(logit);
      const bool is_in = ((its ^ order) & known) == 0 && row->bin(logit) == bin;
      return is_in ? static_cast<int32_t>(0x7ff - (its >> shift & 0x7ff)) : -1;
    });
    const FoundBin found = find_bin(t, s, [wanted](uint64_t) { return wanted; });
    order |= (0x7ffu - static_cast<uint32_t>(found.bin)) << shift;
    wanted -= found.before;
  }
  // Of the equal ones at the threshold, so many that it is enough.
  const uint64_t each = counts_of(counted, row->parts(logit_of(order))).value();
  const uint64_t needed = (wanted - 1) / each + 1;
  const int32_t last = find_in_row(
      t, *row, s,
      [order](const Parts& parts, float logit) {
        return order_of(logit) == order ? counts_of(Counted::kOneEach, parts) : Parts{};
      },
      [needed](uint64_t) { return needed - 1; });
  row->least_order = order;
  row->last_id = last;
}

// Leaves the fewest most likely tokens that count for at least wanted_of(what all do), or all.
template <class Thread, class Wanted>
FP_HD void keep_most_likely(const Thread& t, Counted counted, const Wanted& wanted_of,
                            SampledRow* row, const SampleScratch& s) {
  add_row_to_bins(t, counted, *row, s, kLastBin, [row](float logit) { return row->bin(logit); });
  const FoundBin found = find_bin(t, s, wanted_of);
  if (found.bin < 0)
    return;
  const uint64_t wanted = found.wanted - found.before;
  const int32_t n = fill_list(t, counted, *row, s, found.bin, found.bin);
  if (n > t.count()) {
    cut_by_bits(t, counted, found.bin, wanted, row, s);
    return;
  }
  if (t.index() < n) {
    const Candidate mine = s.list[t.index()];
    const uint64_t before = above(s.list, n, mine.key).count;
    if (before < wanted && wanted <= before + mine.counts) {  // one thread
      *s.index = mine.id();
      s.values[0] = mine.order();
    }
  }
  t.sync();
  row->least_order = static_cast<uint32_t>(s.values[0]);
  row->last_id = *s.index;
  t.sync();  // what was told may be written again
}

}  // namespace flowprefill
