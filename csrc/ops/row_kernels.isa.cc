// The row kernels, written as plain loops for the vectoriser; compiled once per instruction set.
// Nothing with external linkage may be instantiated here but the tables at the end: a shared inline function
// compiled for AVX-512 could be picked by the linker for every processor.
#include <cstdint>
#include <cstring>

#include "ops/row_kernels.h"

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

inline void store(float value, float* out) { *out = value; }
// Round to nearest even.
inline void store(float value, Bf16* out) {
  const uint32_t bits = bits_of(value);
  *out = static_cast<Bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline float load(float value) { return value; }
inline float load(Bf16 value) { return float_of(static_cast<uint32_t>(value) << 16); }

// 2^x for x in [-126, 126]: split into integer and fraction, Taylor polynomial of degree 6 on [-0.5, 0.5]
// (relative error below 2e-7), exponent added to the bits. The truncation of a positive number rounds.
inline float exp2_clamped(float x) {
  x = x < -126.0f ? -126.0f : x;
  x = x > 126.0f ? 126.0f : x;
  const int32_t whole = static_cast<int32_t>(x + 127.5f) - 127;
  const float f = x - static_cast<float>(whole);
  float p = 1.54035304e-4f;
  p = p * f + 1.33335581e-3f;
  p = p * f + 9.61812911e-3f;
  p = p * f + 5.55041087e-2f;
  p = p * f + 2.40226507e-1f;
  p = p * f + 6.93147181e-1f;
  p = p * f + 1.0f;
  return float_of(bits_of(p) + (static_cast<uint32_t>(whole) << 23));
}

inline float inverse_sqrt(float x) { return 1.0f / __builtin_sqrtf(x); }

template <typename T>
void rms_norm(const float* x, const float* weight, int n, float eps, T* out) {
  float sum = 0.0f;
  for (int i = 0; i < n; ++i) sum += x[i] * x[i];
  const float scale = inverse_sqrt(sum / static_cast<float>(n) + eps);
  for (int i = 0; i < n; ++i) store(x[i] * scale * weight[i], out + i);
}

template <typename T>
void swiglu(const float* tile, int64_t ld, int rows, int cols, T* out, int64_t ld_out) {
  for (int r = 0; r < rows; ++r) {
    const float* gate = tile + r * ld;
    const float* up = gate + cols;
    T* row = out + r * ld_out;
    for (int i = 0; i < cols; ++i) {
      store(gate[i] / (1.0f + exp2_clamped(-gate[i] * kLog2E)) * up[i], row + i);
    }
  }
}

// Bias, norm, rotation and scale of one head into `out` [dim], all in float.
inline void rotate(const float* in, const RopeHead& head, const float* cos, const float* sin,
                   float* out) {
  float value[kMaxHeadDim];
  const int dim = head.dim;
  const int half = dim / 2;
  std::memcpy(value, in, sizeof(float) * static_cast<size_t>(dim));
  if (head.bias != nullptr) {
    for (int i = 0; i < dim; ++i) value[i] += head.bias[i];
  }
  if (head.norm_weight != nullptr) {
    float sum = 0.0f;
    for (int i = 0; i < dim; ++i) sum += value[i] * value[i];
    const float scale = inverse_sqrt(sum / static_cast<float>(dim) + head.norm_eps);
    for (int i = 0; i < dim; ++i) value[i] *= scale * head.norm_weight[i];
  }
  for (int i = 0; i < half; ++i) {
    const float a = value[i];
    const float b = value[i + half];
    out[i] = (a * cos[i] - b * sin[i]) * head.scale;
    out[i + half] = (b * cos[i] + a * sin[i]) * head.scale;
  }
}

template <typename T>
void rope_q(const float* in, const RopeHead& head, const float* cos, const float* sin, T* out) {
  float rotated[kMaxHeadDim];
  rotate(in, head, cos, sin, rotated);
  for (int i = 0; i < head.dim; ++i) store(rotated[i], out + i);
}

// Key block: bf16 as [dim / 2][token][2] (the pairs a dot-product instruction takes), float as [dim][token].
inline void put_key(const float* value, int dim, Bf16* block, int slot, int block_tokens) {
  for (int i = 0; i < dim; i += 2) {
    Bf16* pair = block + (static_cast<int64_t>(i / 2) * block_tokens + slot) * 2;
    store(value[i], pair);
    store(value[i + 1], pair + 1);
  }
}
inline void put_key(const float* value, int dim, float* block, int slot, int block_tokens) {
  for (int i = 0; i < dim; ++i) block[static_cast<int64_t>(i) * block_tokens + slot] = value[i];
}

template <typename T>
void rope_k(const float* in, const RopeHead& head, const float* cos, const float* sin, T* block,
            int slot, int block_tokens) {
  float rotated[kMaxHeadDim];
  rotate(in, head, cos, sin, rotated);
  put_key(rotated, head.dim, block, slot, block_tokens);
}

// Value block: bf16 as [token / 2][dim][2], float as [token][dim].
inline void put_value(float value, int i, int dim, Bf16* block, int slot) {
  store(value, block + (static_cast<int64_t>(slot / 2) * dim + i) * 2 + slot % 2);
}
inline void put_value(float value, int i, int dim, float* block, int slot) {
  block[static_cast<int64_t>(slot) * dim + i] = value;
}

template <typename T>
void store_v(const float* in, const float* bias, int dim, T* block, int slot) {
  for (int i = 0; i < dim; ++i) {
    put_value(bias == nullptr ? in[i] : in[i] + bias[i], i, dim, block, slot);
  }
}

template <typename T>
void zero(T* out, int begin, int end) {
  if (end > begin) std::memset(out + begin, 0, sizeof(T) * static_cast<size_t>(end - begin));
}

inline int clamp(int value, int low, int high) {
  return value < low ? low : (value > high ? high : value);
}

// Largest of s[lo, hi) and `peak`. Lanes by hand: a maximum is no reduction to a compiler that respects NaN.
inline float maximum(const float* s, int lo, int hi, float peak) {
  constexpr int kLanes = 32;
  float lanes[kLanes];
  for (int j = 0; j < kLanes; ++j) lanes[j] = peak;
  int i = lo;
  for (; i + kLanes <= hi; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] = s[i + j] > lanes[j] ? s[i + j] : lanes[j];
  }
  for (; i < hi; ++i) lanes[0] = s[i] > lanes[0] ? s[i] : lanes[0];
  for (int j = 0; j < kLanes; ++j) peak = lanes[j] > peak ? lanes[j] : peak;
  return peak;
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
    const float peak = maximum(s, lo, hi, tile.row_max[r]);
    float sum = 0.0f;
    for (int i = lo; i < hi; ++i) {
      const float e = exp2_clamped(s[i] - peak);
      sum += e;
      store(e, p + i);
    }
    zero(p, 0, lo);
    zero(p, hi, tile.cols);
    const float keep = exp2_clamped(tile.row_max[r] - peak);
    tile.row_sum[r] = tile.row_sum[r] * keep + sum;
    if (tile.row_max[r] != peak) {
      float* o = tile.output + static_cast<int64_t>(r) * tile.dim;
      for (int i = 0; i < tile.dim; ++i) o[i] *= keep;
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
  for (int i = 0; i < n; ++i) out[i] = load(row[i]);
}

template <typename T>
void narrow(const float* row, int n, T* out) {
  for (int i = 0; i < n; ++i) store(row[i], out + i);
}

template <typename T>
constexpr RowKernels<T> make_table() {
  return {rms_norm<T>, swiglu<T>,    rope_q<T>, rope_k<T>, store_v<T>,
          softmax<T>,  normalise<T>, widen<T>,  narrow<T>};
}

}  // namespace

extern const RowKernels<float> kRowKernelsF32;
extern const RowKernels<Bf16> kRowKernelsBf16;
const RowKernels<float> kRowKernelsF32 = make_table<float>();
const RowKernels<Bf16> kRowKernelsBf16 = make_table<Bf16>();

}  // namespace FP_ISA_NAMESPACE
}  // namespace flowprefill
