// The row kernels, written as plain loops for the vectoriser; compiled once per instruction set.
// Nothing with external linkage may be instantiated here but the tables at the end: a shared inline
// function compiled for AVX-512 could be picked by the linker for every processor.
#ifdef __AVX512F__
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12, in its own header (bug 105593)
#endif
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "devices/cpu/row_kernels.h"

namespace flowprefill {
namespace FP_ISA_NAMESPACE {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr int kMaxHeadDim = 512;

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void store(float value, float* out) {
  *out = value;
}
// Round to nearest even.
inline void store(float value, Bf16* out) {
  const uint32_t bits = bits_of(value);
  *out = static_cast<Bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline float load(float value) {
  return value;
}
inline float load(Bf16 value) {
  return float_of(static_cast<uint32_t>(value) << 16);
}

// 2^f on [-0.5, 0.5], minimax in relative error: 7.5e-8 (own fit).
constexpr float kExp2[6] = {1.000000072f,    6.931469671e-1f, 2.402211972e-1f,
                            5.550713275e-2f, 9.675541331e-3f, 1.327647152e-3f};

// 2^x for x clamped to [-126, 126]: the integer part is added to the exponent's bits. The
// truncation of a positive number rounds.
inline float exp2_clamped(float x) {
  x = x < -126.0f ? -126.0f : x;
  x = x > 126.0f ? 126.0f : x;
  const int32_t whole = static_cast<int32_t>(x + 127.5f) - 127;
  const float f = x - static_cast<float>(whole);
  float p = kExp2[5];
  for (int i = 4; i >= 0; --i)
    p = p * f + kExp2[i];
  return float_of(bits_of(p) + (static_cast<uint32_t>(whole) << 23));
}

#ifdef __AVX512F__
// The same for 16 numbers by instructions that no compiler finds by itself; under- and overflow are
// right.
inline __m512 exp2_of(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(kExp2[5]);
  for (int i = 4; i >= 0; --i)
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2[i]));
  return _mm512_scalef_ps(p, whole);
}
inline __mmask16 lanes(int n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffff : (1 << n) - 1);
}
inline void store(__m512 value, __mmask16 mask, float* out) {
  _mm512_mask_storeu_ps(out, mask, value);
}
// Narrowing in a register first: a narrowing store with a mask is slow on some processors.
inline void store(__m512 value, __mmask16 mask, Bf16* out) {
#ifdef __AVX512BF16__
  const auto narrow = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value));
#else
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m256i narrow = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
  if (mask == 0xffff) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), narrow);
  } else {
    _mm256_mask_storeu_epi16(out, mask, narrow);
  }
}
#endif

inline float inverse_sqrt(float x) {
  return 1.0f / __builtin_sqrtf(x);
}

template <typename T>
void rms_norm(const float* x, const float* weight, int n, float eps, T* out) {
  float sum = 0.0f;
  for (int i = 0; i < n; ++i)
    sum += x[i] * x[i];
  const float scale = inverse_sqrt(sum / static_cast<float>(n) + eps);
  for (int i = 0; i < n; ++i)
    store(x[i] * scale * weight[i], out + i);
}

template <typename T>
void swiglu_row(const float* gate, const float* up, int n, T* out) {
  int i = 0;
#ifdef __AVX512F__
  for (; i < n; i += 16) {
    const __mmask16 mask = lanes(n - i);
    const __m512 g = _mm512_maskz_loadu_ps(mask, gate + i);
    const __m512 e = exp2_of(_mm512_mul_ps(g, _mm512_set1_ps(-kLog2E)));
    const __m512 product = _mm512_mul_ps(g, _mm512_maskz_loadu_ps(mask, up + i));
    store(_mm512_div_ps(product, _mm512_add_ps(e, _mm512_set1_ps(1.0f))), mask, out + i);
  }
#endif
  for (; i < n; ++i)
    store(gate[i] * up[i] / (1.0f + exp2_clamped(-gate[i] * kLog2E)), out + i);
}

template <typename T>
void swiglu(const float* tile, int64_t ld, int rows, int cols, T* out, int64_t ld_out) {
  for (int r = 0; r < rows; ++r) {
    swiglu_row(tile + r * ld, tile + r * ld + cols, cols, out + r * ld_out);
  }
}

// The head after bias and norm, if it has them; else where it lies.
inline const float* prepared(const float* in, const RopeHead& head, float* scratch) {
  if (head.bias == nullptr && head.norm_weight == nullptr)
    return in;
  for (int i = 0; i < head.dim; ++i)
    scratch[i] = in[i] + (head.bias == nullptr ? 0.0f : head.bias[i]);
  if (head.norm_weight != nullptr) {
    float sum = 0.0f;
    for (int i = 0; i < head.dim; ++i)
      sum += scratch[i] * scratch[i];
    const float scale = inverse_sqrt(sum / static_cast<float>(head.dim) + head.norm_eps);
    for (int i = 0; i < head.dim; ++i)
      scratch[i] *= scale * head.norm_weight[i];
  }
  return scratch;
}

template <typename T>
void rope(const float* in, const RopeHead& head, const float* __restrict cos,
          const float* __restrict sin, T* __restrict out) {
  float scratch[kMaxHeadDim];
  const int half = head.dim / 2;
  const float scale = head.scale;
  const float* __restrict a = prepared(in, head, scratch);
  const float* __restrict b = a + half;
  for (int i = 0; i < half; ++i) {
    store((a[i] * cos[i] - b[i] * sin[i]) * scale, out + i);
    store((b[i] * cos[i] + a[i] * sin[i]) * scale, out + half + i);
  }
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

// Largest of s[0, n) and `peak`.
inline float maximum(const float* s, int n, float peak) {
  int i = 0;
#ifdef __AVX512F__
  __m512 most = _mm512_set1_ps(peak);
  for (; i < n; i += 16) {
    most = _mm512_mask_max_ps(most, lanes(n - i), most, _mm512_maskz_loadu_ps(lanes(n - i), s + i));
  }
  return _mm512_reduce_max_ps(most);
#else
  constexpr int kLanes = 16;  // by hand: a maximum is no reduction to a compiler that respects NaN
  float most[kLanes];
  for (int j = 0; j < kLanes; ++j)
    most[j] = peak;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j)
      most[j] = s[i + j] > most[j] ? s[i + j] : most[j];
  }
  for (; i < n; ++i)
    most[0] = s[i] > most[0] ? s[i] : most[0];
  for (int j = 0; j < kLanes; ++j)
    peak = most[j] > peak ? most[j] : peak;
  return peak;
#endif
}

// p[i] = 2^(s[i] - peak); returns their sum.
template <typename T>
float exponentials(const float* s, int n, float peak, T* p) {
  float sum = 0.0f;
  int i = 0;
#ifdef __AVX512F__
  __m512 sums = _mm512_setzero_ps();
  for (; i < n; i += 16) {
    const __mmask16 mask = lanes(n - i);
    const __m512 x = _mm512_maskz_loadu_ps(mask, s + i);
    const __m512 e = exp2_of(_mm512_sub_ps(x, _mm512_set1_ps(peak)));
    sums = _mm512_mask_add_ps(sums, mask, sums, e);
    store(e, mask, p + i);
  }
  sum = _mm512_reduce_add_ps(sums);
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
constexpr RowKernels<T> make_table() {
  return {rms_norm<T>, swiglu<T>,    rope<T>,  store_keys, store_values,
          softmax<T>,  normalise<T>, widen<T>, narrow<T>};
}

}  // namespace

extern const RowKernels<float> kRowKernelsF32;
extern const RowKernels<Bf16> kRowKernelsBf16;
const RowKernels<float> kRowKernelsF32 = make_table<float>();
const RowKernels<Bf16> kRowKernelsBf16 = make_table<Bf16>();

}  // namespace FP_ISA_NAMESPACE
}  // namespace flowprefill
