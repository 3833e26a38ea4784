// A library with the functions of cuBLASLt that CublasLt calls, loaded by gemm_cublas_lt_test.cc in
// its place: it multiplies what the descriptors say, column-major as the public header has it, at
// once and on the host. Built only where cublasLt.h is.
#include <cublasLt.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>

#include "devices/cuda/kernels/fp8.h"

namespace {

constexpr size_t kWorkspaceBytes = 1024;  // what each algorithm here wants

struct Layout {
  cudaDataType type;
  uint64_t rows, columns;
  int64_t ld;
};
struct Product {
  cublasOperation_t transa = CUBLAS_OP_N;
  cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  const float* bias = nullptr;
  int32_t scale_modes[2] = {};  // of A and B; 3: a scale for each row of A, each column of B
  const float* scales[2] = {};
};

template <typename T>
T& as(void* opaque) {
  return *static_cast<T*>(opaque);
}

float read(const void* memory, const Layout& layout, int64_t row, int64_t column) {
  const int64_t at = row + column * layout.ld;
  if (layout.type == CUDA_R_32F)
    return static_cast<const float*>(memory)[at];
  if (layout.type == CUDA_R_8F_E4M3)
    return flowprefill::widen(static_cast<const flowprefill::E4m3*>(memory)[at]);
  const uint32_t bits = uint32_t{static_cast<const uint16_t*>(memory)[at]} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void write(void* memory, const Layout& layout, int64_t row, int64_t column, float value) {
  const int64_t at = row + column * layout.ld;
  if (layout.type == CUDA_R_32F) {
    static_cast<float*>(memory)[at] = value;
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  static_cast<uint16_t*>(memory)[at] = static_cast<uint16_t>((bits + 0x8000) >> 16);
}

// What the documentation demands of FP8: sides of 16, scales of either kind for both or for none,
// no bias in float; the second kind may be absent (FAKE_CUBLAS_LT_NO_VECTORS).
bool takes_fp8(const Product& how, const Layout& a, const Layout& b, const Layout& d) {
  if (a.type != CUDA_R_8F_E4M3)
    return b.type != CUDA_R_8F_E4M3;
  const bool has_vectors = how.scale_modes[0] == 3 && how.scale_modes[1] == 3;
  const bool has_none = how.scale_modes[0] == 0 && how.scale_modes[1] == 0;
  if (has_vectors && std::getenv("FAKE_CUBLAS_LT_NO_VECTORS") != nullptr)
    return false;
  return b.type == a.type && a.rows % 16 == 0 && a.ld % 16 == 0 && b.ld % 16 == 0 &&
         d.rows % 16 == 0 && (has_vectors || has_none) &&
         (!has_vectors || (how.scales[0] != nullptr && how.scales[1] != nullptr)) &&
         how.epilogue == CUBLASLT_EPILOGUE_DEFAULT;
}

}  // namespace

// How many descriptors exist, how often an algorithm was asked for, and for how many rows last.
extern "C" {
int fake_cublas_lt_live = 0;
int fake_cublas_lt_asked = 0;
int fake_cublas_lt_rows = 0;
}

size_t cublasLtGetVersion() {
  const char* version = std::getenv("FAKE_CUBLAS_LT_VERSION");
  return version == nullptr ? CUBLAS_VERSION : std::strtoul(version, nullptr, 10);
}
const char* cublasLtGetStatusName(cublasStatus_t status) {
  return status == CUBLAS_STATUS_NOT_SUPPORTED ? "CUBLAS_STATUS_NOT_SUPPORTED" : "another status";
}
cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  ++fake_cublas_lt_live;
  *handle = reinterpret_cast<cublasLtHandle_t>(&fake_cublas_lt_live);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t) {
  --fake_cublas_lt_live;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* out, cublasComputeType_t compute,
                                        cudaDataType_t scale) {
  if (compute != CUBLAS_COMPUTE_32F || scale != CUDA_R_32F)
    return CUBLAS_STATUS_NOT_SUPPORTED;
  ++fake_cublas_lt_live;
  *out = reinterpret_cast<cublasLtMatmulDesc_t>(new Product);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t product) {
  --fake_cublas_lt_live;
  delete &as<Product>(product);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t product,
                                              cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, size_t bytes) {
  auto& of = as<Product>(product);
  const auto take = [&](auto* to) {
    if (bytes != sizeof *to)
      return CUBLAS_STATUS_INVALID_VALUE;
    std::memcpy(to, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
  };
  switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA:
      return take(&of.transa);
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
      return take(&of.epilogue);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
      return take(&of.bias);
    case CUBLASLT_MATMUL_DESC_A_SCALE_POINTER:
      return take(&of.scales[0]);
    case CUBLASLT_MATMUL_DESC_B_SCALE_POINTER:
      return take(&of.scales[1]);
    default:  // the scale modes, which older headers do not name
      if (attribute != 31 && attribute != 32)
        return CUBLAS_STATUS_INVALID_VALUE;
      return take(&of.scale_modes[attribute - 31]);
  }
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* out, cudaDataType type,
                                          uint64_t rows, uint64_t columns, int64_t ld) {
  ++fake_cublas_lt_live;
  *out = reinterpret_cast<cublasLtMatrixLayout_t>(new Layout{type, rows, columns, ld});
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
  --fake_cublas_lt_live;
  delete &as<Layout>(layout);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t attribute,
                                                const void* value, size_t bytes) {
  auto& of = as<Layout>(layout);
  if (bytes != sizeof(uint64_t) ||
      (attribute != CUBLASLT_MATRIX_LAYOUT_COLS && attribute != CUBLASLT_MATRIX_LAYOUT_ROWS))
    return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(attribute == CUBLASLT_MATRIX_LAYOUT_COLS ? &of.columns : &of.rows, value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* out) {
  ++fake_cublas_lt_live;
  *out = reinterpret_cast<cublasLtMatmulPreference_t>(
      new std::map<cublasLtMatmulPreferenceAttributes_t, uint64_t>);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  --fake_cublas_lt_live;
  delete &as<std::map<cublasLtMatmulPreferenceAttributes_t, uint64_t>>(preference);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void* value, size_t bytes) {
  const size_t wanted = attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES ? 8 : 4;
  if (bytes != wanted)
    return CUBLAS_STATUS_INVALID_VALUE;
  uint64_t number = 0;
  std::memcpy(&number, value, bytes);
  as<std::map<cublasLtMatmulPreferenceAttributes_t, uint64_t>>(preference)[attribute] = number;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t product,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int most,
                                              cublasLtMatmulHeuristicResult_t* result, int* count) {
  ++fake_cublas_lt_asked;
  fake_cublas_lt_rows = static_cast<int>(as<Layout>(b).columns);
  auto& wants = as<std::map<cublasLtMatmulPreferenceAttributes_t, uint64_t>>(preference);
  // The depth may be split for few rows only, and without atomics.
  const uint64_t scheme = as<Layout>(b).columns < 2048 ? CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE
                                                       : CUBLASLT_REDUCTION_SCHEME_NONE;
  const bool is_as_documented = wants.at(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK) == scheme &&
                                wants.at(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES) == 16 &&
                                wants.at(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES) == 16;
  // Nothing for a depth of 8: what a library may say of any product.
  const bool takes = takes_fp8(as<Product>(product), as<Layout>(a), as<Layout>(b), as<Layout>(d));
  *count = is_as_documented && takes && as<Layout>(a).rows != 8 ? std::min(most, 3) : 0;
  // The algorithms: how the depth is split into sums, by the sizes asked for.
  const uint64_t split = as<Layout>(b).columns <= 64 ? 2 : as<Layout>(a).columns % 128 == 0 ? 8 : 4;
  for (int i = 0; i < *count; ++i) {
    result[i] = {};
    result[i].workspaceSize = kWorkspaceBytes;
    result[i].state = CUBLAS_STATUS_SUCCESS;
    result[i].algo.data[0] = split << i;
  }
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(const cublasLtMatmulAlgo_t* algorithm,
                                                    cublasLtMatmulAlgoConfigAttributes_t attribute,
                                                    void* value, size_t bytes, size_t* written) {
  const bool is_short = attribute == CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID ||
                        attribute == CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID;
  if (bytes != (is_short ? 2 : 4))
    return CUBLAS_STATUS_INVALID_VALUE;
  const auto number = attribute == CUBLASLT_ALGO_CONFIG_SPLITK_NUM
                          ? static_cast<uint32_t>(algorithm->data[0])
                          : static_cast<uint32_t>(attribute);
  std::memcpy(value, &number, bytes);
  *written = bytes;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t, cublasLtMatmulDesc_t,
                                       cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                       cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                       const cublasLtMatmulAlgo_t* algorithm,
                                       cublasLtMatmulHeuristicResult_t* result) {
  // Of a depth of 24 only: an algorithm that wants more memory the more rows there are.
  const bool grows = as<Layout>(a).rows == 24;
  result->workspaceSize = grows ? as<Layout>(b).columns * kWorkspaceBytes : kWorkspaceBytes;
  result->state = CUBLAS_STATUS_SUCCESS;
  // Of a depth of 40 only: no two parts.
  const bool takes = as<Layout>(a).rows != 40 || algorithm->data[0] != 2;
  return takes ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}
cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t product, const void* alpha,
                              const void* a, cublasLtMatrixLayout_t of_a, const void* b,
                              cublasLtMatrixLayout_t of_b, const void* beta, const void* c,
                              cublasLtMatrixLayout_t of_c, void* d, cublasLtMatrixLayout_t of_d,
                              const cublasLtMatmulAlgo_t* algorithm, void* workspace,
                              size_t workspace_bytes, cudaStream_t) {
  const auto& how = as<Product>(product);
  const auto &la = as<Layout>(of_a), &lb = as<Layout>(of_b), &ld = as<Layout>(of_d);
  if (!takes_fp8(how, la, lb, ld) || how.transa != CUBLAS_OP_T || la.rows != lb.rows ||
      ld.rows != la.columns || ld.columns != lb.columns || workspace_bytes < kWorkspaceBytes ||
      reinterpret_cast<uintptr_t>(workspace) % 256 != 0) {
    return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  std::memset(workspace, 0xff, kWorkspaceBytes);
  for (uint64_t row = 0; row < ld.rows; ++row) {
    for (uint64_t column = 0; column < ld.columns; ++column) {
      float sum = 0;
      for (uint64_t lane = 0; lane < algorithm->data[0]; ++lane) {
        float part = 0;
        for (uint64_t k = lane; k < la.rows; k += algorithm->data[0])
          part += read(a, la, static_cast<int64_t>(k), static_cast<int64_t>(row)) *
                  read(b, lb, static_cast<int64_t>(k), static_cast<int64_t>(column));
        sum += part;
      }
      sum *= *static_cast<const float*>(alpha);
      if (how.scale_modes[0] == 3)
        sum *= how.scales[0][row] * how.scales[1][column];
      if (const float scale = *static_cast<const float*>(beta); scale != 0) {
        sum += scale *
               read(c, as<Layout>(of_c), static_cast<int64_t>(row), static_cast<int64_t>(column));
      }
      if (how.epilogue == CUBLASLT_EPILOGUE_BIAS)
        sum += how.bias[row];
      write(d, ld, static_cast<int64_t>(row), static_cast<int64_t>(column), sum);
    }
  }
  return CUBLAS_STATUS_SUCCESS;
}
