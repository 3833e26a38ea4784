// The row kernels, written as plain loops for the vectoriser; compiled once per instruction set.
// Nothing with external linkage may be instantiated here but the tables at the end: a shared inline
// function compiled for AVX-512 could be picked by the linker for every processor.
#include <cstdint>
#include <cstring>

#include "devices/cpu/isa_attention.h"
#include "devices/cpu/isa_attention_amx.h"
#include "devices/cpu/isa_block_product.h"
#include "devices/cpu/isa_blocks.h"
#include "devices/cpu/isa_int8.h"
#include "devices/cpu/isa_math.h"
#include "devices/cpu/isa_product.h"
#include "devices/cpu/isa_product_amx.h"
#include "devices/cpu/isa_product_bf16.h"
#include "devices/cpu/isa_sample.h"
#include "devices/cpu/isa_score.h"
#include "devices/cpu/row_kernels.h"

namespace flowprefill {
namespace FP_ISA_NAMESPACE {
namespace {

constexpr int kMaxHeadDim = 512;

template <typename T>
void rms_norm(const float* x, const float* weight, int n, float eps, T* out) {
  float sum = 0.0f;
  for (int i = 0; i < n; ++i)
    sum += x[i] * x[i];
  const float scale = inverse_sqrt(sum / static_cast<float>(n) + eps);
  for (int i = 0; i < n; ++i)
    store(x[i] * scale * weight[i], out + i);
}

inline float inverse_rms(const float* x, const float* bias, int n, float eps) {
  float sum = 0.0f;
  for (int i = 0; i < n; ++i) {
    const float value = bias == nullptr ? x[i] : x[i] + bias[i];
    sum += value * value;
  }
  return inverse_sqrt(sum / static_cast<float>(n) + eps);
}

void add_scaled(const float* __restrict x, const float* __restrict weight, int n, float eps,
                float scale, float* __restrict out) {
  if (weight == nullptr) {
    for (int i = 0; i < n; ++i)
      out[i] += scale * x[i];
    return;
  }
  scale *= inverse_rms(x, nullptr, n, eps);
  for (int i = 0; i < n; ++i)
    out[i] += scale * x[i] * weight[i];
}

void soft_cap(float* x, int n, float cap) {
  const float inverse = 1.0f / cap;
  int i = 0;
#ifdef __AVX512F__
  for (; i < n; i += 16) {
    const __mmask16 mask = lanes(n - i);
    const __m512 y = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), _mm512_set1_ps(inverse));
    _mm512_mask_storeu_ps(x + i, mask, _mm512_mul_ps(tanh_of(y), _mm512_set1_ps(cap)));
  }
#endif
  for (; i < n; ++i)
    x[i] = cap * tanh_of(x[i] * inverse);
}

enum class Gate { kSilu, kGelu };

// gelu(x) = x / (1 + 2^(x * (kGelu[0] + kGelu[1] * x^2))): the formula with tanh, in base 2.
constexpr float kGelu[2] = {-2.0f * kLog2E * 0.797884560802865f,
                            -2.0f * kLog2E * 0.797884560802865f * 0.044715f};

// log2 of what is added to 1 in the denominator of an activation.
template <Gate kGate>
inline float gate_exponent(float g) {
  return kGate == Gate::kSilu ? -g * kLog2E : g * (kGelu[0] + kGelu[1] * (g * g));
}
#ifdef __AVX512F__
template <Gate kGate>
inline __m512 gate_exponent(__m512 g) {
  if constexpr (kGate == Gate::kSilu)
    return _mm512_mul_ps(g, _mm512_set1_ps(-kLog2E));
  const __m512 square = _mm512_mul_ps(g, g);
  return _mm512_mul_ps(g,
                       _mm512_fmadd_ps(square, _mm512_set1_ps(kGelu[1]), _mm512_set1_ps(kGelu[0])));
}
#endif

template <Gate kGate, typename T>
void gate_row(const float* gate, const float* up, int n, T* out) {
  int i = 0;
#ifdef __AVX512F__
  for (; i < n; i += 16) {
    const __mmask16 mask = lanes(n - i);
    const __m512 g = _mm512_maskz_loadu_ps(mask, gate + i);
    const __m512 e = exp2_of(gate_exponent<kGate>(g));
    const __m512 product = _mm512_mul_ps(g, _mm512_maskz_loadu_ps(mask, up + i));
    store(_mm512_div_ps(product, _mm512_add_ps(e, _mm512_set1_ps(1.0f))), mask, out + i);
  }
#endif
  for (; i < n; ++i)
    store(gate[i] * up[i] / (1.0f + exp2_clamped(gate_exponent<kGate>(gate[i]))), out + i);
}

template <Gate kGate, typename T>
void gate_rows(const float* tile, int64_t ld, int rows, int cols, T* out, int64_t ld_out) {
  for (int r = 0; r < rows; ++r) {
    gate_row<kGate>(tile + r * ld, tile + r * ld + cols, cols, out + r * ld_out);
  }
}

// The head after bias and norm, if it has them; else where it lies.
inline const float* prepared(const float* in, const RopeHead& head, float* scratch) {
  if (head.bias == nullptr && head.norm_weight == nullptr)
    return in;
  for (int i = 0; i < head.dim; ++i)
    scratch[i] = in[i] + (head.bias == nullptr ? 0.0f : head.bias[i]);
  if (head.norm_weight != nullptr) {
    const float scale = head.inverse_rms != 0.0f
                            ? head.inverse_rms
                            : inverse_rms(scratch, nullptr, head.dim, head.norm_eps);
    for (int i = 0; i < head.dim; ++i)
      scratch[i] *= scale * head.norm_weight[i];
  }
  return scratch;
}

template <typename T>
void rope(const float* in, const RopeHead& head, const float* __restrict cos,
          const float* __restrict sin, T* __restrict out) {
  float scratch[kMaxHeadDim];
  const int half = head.turning / 2;
  const float scale = head.scale;
  const float* __restrict a = prepared(in, head, scratch);
  const float* __restrict b = a + half;
  for (int i = 0; i < half; ++i) {
    store((a[i] * cos[i] - b[i] * sin[i]) * scale, out + i);
    store((b[i] * cos[i] + a[i] * sin[i]) * scale, out + half + i);
  }
  for (int i = head.turning; i < head.dim; ++i)
    store(a[i] * scale, out + i);
}

// Key block: bf16 as [dim / 2][token][2] (the pairs a dot-product instruction takes), float as
// [dim][token]: a transposition of whole words, pairs being neighbours already.
template <typename Word>
void transpose(const Word* __restrict rows, int num_rows, int width, Word* __restrict out,
               int64_t ld) {
  for (int i = 0; i < width; ++i) {
    for (int r = 0; r < num_rows; ++r)
      out[i * ld + r] = rows[static_cast<int64_t>(r) * width + i];
  }
}
void store_keys(const Bf16* keys, int rows, int dim, Bf16* block, int slot, int block_tokens) {
  transpose(reinterpret_cast<const uint32_t*>(keys), rows, dim / 2,
            reinterpret_cast<uint32_t*>(block) + slot, block_tokens);
}
void store_keys(const float* keys, int rows, int dim, float* block, int slot, int block_tokens) {
  transpose(keys, rows, dim, block + slot, block_tokens);
}

inline float with_bias(const float* in, const float* bias, int i) {
  return bias == nullptr ? in[i] : in[i] + bias[i];
}

// Value block: bf16 as [token / 2][dim][2], float as [token][dim].
void store_values(const float* in, int64_t ld, const float* bias, int rows, int dim, Bf16* block,
                  int slot) {
  for (int r = 0; r < rows; ++r) {
    const float* __restrict row = in + r * ld;
    const int token = slot + r;
    Bf16* __restrict out = block + static_cast<int64_t>(token / 2) * dim * 2 + token % 2;
    if (token % 2 == 0 && r + 1 < rows) {  // both tokens of a pair at once
      const float* __restrict next = row + ld;
      for (int i = 0; i < dim; ++i) {
        store(with_bias(row, bias, i), out + 2 * i);
        store(with_bias(next, bias, i), out + 2 * i + 1);
      }
      ++r;
    } else {
      for (int i = 0; i < dim; ++i)
        store(with_bias(row, bias, i), out + 2 * i);
    }
  }
}
void store_values(const float* in, int64_t ld, const float* bias, int rows, int dim, float* block,
                  int slot) {
  for (int r = 0; r < rows; ++r) {
    float* out = block + static_cast<int64_t>(slot + r) * dim;
    for (int i = 0; i < dim; ++i)
      out[i] = with_bias(in + r * ld, bias, i);
  }
}

template <typename T>
void zero(T* out, int begin, int end) {
  if (end > begin)
    std::memset(out + begin, 0, sizeof(T) * static_cast<size_t>(end - begin));
}

inline int clamp(int value, int low, int high) {
  return value < low ? low : (value > high ? high : value);
}

// p[i] = 2^(s[i] - peak); returns their sum.
template <typename T>
float exponentials(const float* s, int n, float peak, T* p) {
  float sum = 0.0f;
  int i = 0;
#ifdef __AVX512F__
  const __m512 most = _mm512_set1_ps(peak);
  __m512 sums[kChains];
  for (__m512& one : sums)
    one = _mm512_setzero_ps();
  for (; i + 16 * kChains <= n; i += 16 * kChains) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      const __m512 e = exp2_of(_mm512_sub_ps(_mm512_loadu_ps(s + i + 16 * c), most));
      sums[c] = _mm512_add_ps(sums[c], e);
      store(e, 0xffff, p + i + 16 * c);
    }
  }
  for (; i < n; i += 16) {
    const __mmask16 mask = lanes(n - i);
    const __m512 e = exp2_of(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, s + i), most));
    sums[0] = _mm512_mask_add_ps(sums[0], mask, sums[0], e);
    store(e, mask, p + i);
  }
  sum = _mm512_reduce_add_ps(
      _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
#endif
  for (; i < n; ++i) {
    const float e = exp2_clamped(s[i] - peak);
    sum += e;
    store(e, p + i);
  }
  return sum;
}

template <typename T>
void softmax(const SoftmaxTile& tile, T* probabilities) {
  for (int r = 0; r < tile.rows; ++r) {
    const int lo = clamp(tile.valid_lo[r], 0, tile.cols);
    const int hi = clamp(tile.valid_hi[r], 0, tile.cols);
    float* s = tile.scores + r * tile.ld;
    T* p = probabilities + r * tile.ld;
    if (hi <= lo) {
      zero(p, 0, tile.cols);
      continue;
    }
    if (tile.softcap != 0.0f)
      soft_cap(s + lo, hi - lo, tile.softcap);
    const float peak = maximum(s + lo, hi - lo, tile.row_max[r]);
    const float sum = exponentials(s + lo, hi - lo, peak, p + lo);
    zero(p, 0, lo);
    zero(p, hi, tile.cols);
    const float keep = exp2_clamped(tile.row_max[r] - peak);
    tile.row_sum[r] = tile.row_sum[r] * keep + sum;
    if (tile.row_max[r] != peak) {
      float* o = tile.output + static_cast<int64_t>(r) * tile.dim;
      for (int i = 0; i < tile.dim; ++i)
        o[i] *= keep;
      tile.row_max[r] = peak;
    }
  }
}

inline void scale_and_add(float keep, float take, const float* __restrict from, int n,
                          float* __restrict to) {
  for (int i = 0; i < n; ++i)
    to[i] = to[i] * keep + from[i] * take;
}

void merge(const PartialSoftmax& further, int rows, const PartialSoftmax& all) {
  for (int r = 0; r < rows; ++r) {
    if (further.row_max[r] <= kNoMaximum)
      continue;
    const bool is_first = all.row_max[r] <= kNoMaximum;
    const float rise = is_first ? 0.0f : further.row_max[r] - all.row_max[r];
    const float keep = is_first ? 0.0f : (rise > 0.0f ? exp2_clamped(-rise) : 1.0f);
    const float take = rise < 0.0f ? exp2_clamped(rise) : 1.0f;
    if (is_first || rise > 0.0f)
      all.row_max[r] = further.row_max[r];
    scale_and_add(keep, take, further.row_sum + r * all.sums, all.sums, all.row_sum + r * all.sums);
    const int64_t first = static_cast<int64_t>(r) * all.dim;
    scale_and_add(keep, take, further.output + first, all.dim, all.output + first);
  }
}

template <typename T>
void normalise(const float* output, const float* row_sum, int rows, int dim, T* out,
               int64_t ld_out) {
  for (int r = 0; r < rows; ++r) {
    const float scale = 1.0f / row_sum[r];
    for (int i = 0; i < dim; ++i) {
      store(output[static_cast<int64_t>(r) * dim + i] * scale, out + r * ld_out + i);
    }
  }
}

template <typename T>
void widen(const T* row, int n, float* out) {
  for (int i = 0; i < n; ++i)
    out[i] = load(row[i]);
}

template <typename T>
void narrow(const float* row, int n, T* out) {
  for (int i = 0; i < n; ++i)
    store(row[i], out + i);
}

template <typename T>
constexpr void (*attend_of())(const AttentionTile&) {
#ifdef __AVX512BF16__
  if constexpr (sizeof(T) == sizeof(Bf16))
    return attend;
#endif
  return nullptr;
}

template <typename T>
constexpr void (*attend_by_tiles_of())(const AttentionTile&) {
#if defined(__AVX512BF16__) && defined(__x86_64__)
  if constexpr (sizeof(T) == sizeof(Bf16))
    return attend_by_tiles;
#endif
  return nullptr;
}

constexpr void (*multiply_by_tiles_of(bool is_of_bytes))(const TileProduct&) {
#if defined(__AVX512BF16__) && defined(__x86_64__)
  return is_of_bytes ? multiply_by_tiles<true> : multiply_by_tiles<false>;
#else
  static_cast<void>(is_of_bytes);
  return nullptr;
#endif
}

template <typename T>
constexpr void (*multiply_of())(const Product<T>&) {
#ifndef __AVX512BF16__
  if constexpr (sizeof(T) == sizeof(Bf16))
    return nullptr;
  else
#endif
    return multiply;
}

template <typename T>
constexpr RowKernels<T> make_table() {
  return {.rms_norm = rms_norm<T>,
          .inverse_rms = inverse_rms,
          .add_scaled = add_scaled,
          .swiglu = gate_rows<Gate::kSilu, T>,
          .geglu = gate_rows<Gate::kGelu, T>,
          .soft_cap = soft_cap,
          .rope = rope<T>,
          .store_keys = store_keys,
          .store_values = store_values,
          .softmax = softmax<T>,
          .merge = merge,
          .normalise = normalise<T>,
          .attend = attend_of<T>(),
          .attend_by_tiles = attend_by_tiles_of<T>(),
          .multiply = multiply_of<T>(),
          .multiply_by_tiles = multiply_by_tiles_of(false),
          .multiply_bytes_by_tiles = multiply_by_tiles_of(true),
          .widen = widen<T>,
          .narrow = narrow<T>,
          .unpack = unpack<T>,
          .prepare_few = prepare_few<T>,
          .multiply_few = multiply_few<T>,
          .score = score,
          .most_likely = most_likely,
          .weigh = weigh,
          .sum = sum,
          .find_at_least = find_at_least,
          .rotate = rotate<T>,
          .round_to_bytes = round_to_bytes,
          .scale_product = scale_product};
}

}  // namespace

extern const RowKernels<float> kRowKernelsF32;
extern const RowKernels<Bf16> kRowKernelsBf16;
const RowKernels<float> kRowKernelsF32 = make_table<float>();
const RowKernels<Bf16> kRowKernelsBf16 = make_table<Bf16>();

}  // namespace FP_ISA_NAMESPACE
}  // namespace flowprefill
