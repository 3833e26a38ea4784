// Long because all that is known of the library stands here: its functions, the descriptors and
// algorithm of a product, and the products that are prepared.
#include "devices/cuda/backend/gemm_cublas_lt.h"

#include <stdexcept>
#include <utility>

#include "devices/cuda/backend/gemm_choices.h"
#include "devices/cuda/kernels/expect.h"
#include "runtime/thread_annotations.h"

#if __has_include(<cublasLt.h>)

#include <cublasLt.h>
#include <dlfcn.h>

#include <array>
#include <cstdint>
#include <map>
#include <tuple>

namespace flowprefill {
namespace {

// The library's functions, with the types of its header.
struct Functions {
  decltype(&cublasLtGetVersion) get_version = nullptr;
  decltype(&cublasLtGetStatusName) get_status_name = nullptr;
  decltype(&cublasLtCreate) create = nullptr;
  decltype(&cublasLtDestroy) destroy = nullptr;
  decltype(&cublasLtMatmulDescCreate) product_create = nullptr;
  decltype(&cublasLtMatmulDescDestroy) product_destroy = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) product_set = nullptr;
  decltype(&cublasLtMatrixLayoutCreate) layout_create = nullptr;
  decltype(&cublasLtMatrixLayoutDestroy) layout_destroy = nullptr;
  decltype(&cublasLtMatrixLayoutSetAttribute) layout_set = nullptr;
  decltype(&cublasLtMatmulPreferenceCreate) preference_create = nullptr;
  decltype(&cublasLtMatmulPreferenceDestroy) preference_destroy = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) get_heuristic = nullptr;
  decltype(&cublasLtMatmulAlgoCheck) check_algorithm = nullptr;
  decltype(&cublasLtMatmulAlgoConfigGetAttribute) get_config = nullptr;
  decltype(&cublasLtMatmul) matmul = nullptr;

  // Name of the first function that is missing; null: all there.
  const char* find(void* library) {
    const char* missing = nullptr;
    const auto take = [library, &missing](auto* function, const char* name) {
      *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(dlsym(library, name));
      if (*function == nullptr && missing == nullptr)
        missing = name;
    };
    take(&get_version, "cublasLtGetVersion");
    take(&get_status_name, "cublasLtGetStatusName");
    take(&create, "cublasLtCreate");
    take(&destroy, "cublasLtDestroy");
    take(&product_create, "cublasLtMatmulDescCreate");
    take(&product_destroy, "cublasLtMatmulDescDestroy");
    take(&product_set, "cublasLtMatmulDescSetAttribute");
    take(&layout_create, "cublasLtMatrixLayoutCreate");
    take(&layout_destroy, "cublasLtMatrixLayoutDestroy");
    take(&layout_set, "cublasLtMatrixLayoutSetAttribute");
    take(&preference_create, "cublasLtMatmulPreferenceCreate");
    take(&preference_destroy, "cublasLtMatmulPreferenceDestroy");
    take(&preference_set, "cublasLtMatmulPreferenceSetAttribute");
    take(&get_heuristic, "cublasLtMatmulAlgoGetHeuristic");
    take(&check_algorithm, "cublasLtMatmulAlgoCheck");
    take(&get_config, "cublasLtMatmulAlgoConfigGetAttribute");
    take(&matmul, "cublasLtMatmul");
    return missing;
  }

  void check(cublasStatus_t status, const char* call) const {
    if (status != CUBLAS_STATUS_SUCCESS)
      throw std::runtime_error(std::string(call) + ": " + get_status_name(status));
  }
};

// Attributes of cuBLASLt 12.9: a header that is older has no names for them.
constexpr auto kScaleModeA = static_cast<cublasLtMatmulDescAttributes_t>(31);
constexpr auto kScaleModeB = static_cast<cublasLtMatmulDescAttributes_t>(32);
constexpr int32_t kOuterVectors = 3;  // a scale for each row of its A, and for each column of B

// Rows of the longest operator.
constexpr int32_t kMostRows = 1 << 17;

// Whether the depth may be split among blocks of threads. A product of few rows has too few tiles
// to keep a GPU busy otherwise: 32 for 4096 columns, on 132 multiprocessors. Of the schemes this
// one is as repeatable as no split: partial sums of float go to the workspace, and a second kernel
// adds them in order; there are no atomics. How many parts there are stands in the algorithm, which
// is one for all slices, and their borders follow from it and the depth: neither the rows nor the
// columns of a slice change the order of an element's sum.
uint32_t reduction_schemes(const GemmShape& shape) {
  return shape.rows == kRowClasses.back() ? CUBLASLT_REDUCTION_SCHEME_NONE
                                          : CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
}

// Descriptors of one operator and one of the algorithms that the library suggests for it; the rows
// and columns of a slice are set anew for each launch. cuBLASLt's matrices are column-major, so it
// is told d^T = b * a^T: its A is our b, its B our a.
class Product {
 public:
  Product(const Functions& lt, cublasLtHandle_t handle, const GemmArgs& args, size_t suggestion)
      : lt_(lt) {
    try {
      make(args);
      take_suggestion(handle, shape_of(args), suggestion);
    } catch (...) {
      destroy();
      throw;
    }
  }
  ~Product() { destroy(); }
  Product(const Product&) = delete;
  Product& operator=(const Product&) = delete;

  void launch(cublasLtHandle_t handle, const GemmArgs& args, std::span<std::byte> workspace,
              cudaStream_t stream) {
    const float alpha = args.scale;
    const float beta = args.adds_to_d ? 1.0f : 0.0f;
    void* d = args.output == GemmOutput::kFloat ? static_cast<void*>(args.first_d<float>())
                                                : static_cast<void*>(args.first_d<Bf16>());
    if (args.bias != nullptr)
      set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, args.bias);
    if (args.fp8.a_scales != nullptr)
      set_scales(args.fp8.b_scales, args.fp8.a_scales + args.row_begin);
    set_size(args.rows(), args.columns);
    const void* weights = args.b;
    const void* rows = args.first_a();
    if (args.is_fp8()) {
      weights = args.fp8.b;
      rows = args.fp8.a + args.row_begin * args.lda;
    }
    lt_.check(
        lt_.matmul(handle, product_, &alpha, weights, weights_, rows, rows_, &beta, d, result_, d,
                   result_, &found_.algo, workspace.data(), CublasLt::kWorkspaceBytes, stream),
        "cublasLtMatmul");
  }

  std::string config() const {
    struct Attribute {
      const char* name;
      cublasLtMatmulAlgoConfigAttributes_t id;
      size_t bytes = sizeof(uint32_t);
    };
    constexpr Attribute kAttributes[] = {
        {"algorithm", CUBLASLT_ALGO_CONFIG_ID},
        {"tile", CUBLASLT_ALGO_CONFIG_TILE_ID},
        {"stages", CUBLASLT_ALGO_CONFIG_STAGES_ID},
        {"split", CUBLASLT_ALGO_CONFIG_SPLITK_NUM},
        {"scheme", CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME},
        {"swizzle", CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING},
        {"custom", CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION},
        {"inner", CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID, sizeof(uint16_t)},
        {"cluster", CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, sizeof(uint16_t)},
    };
    std::string out;
    for (const Attribute& attribute : kAttributes) {
      uint32_t value = 0;
      size_t written = 0;
      const cublasStatus_t status =
          lt_.get_config(&found_.algo, attribute.id, &value, attribute.bytes, &written);
      const bool is_known = status == CUBLAS_STATUS_SUCCESS;
      out += std::string(attribute.name) + ' ' + (is_known ? std::to_string(value) : "?") + ' ';
    }
    return out + "workspace " + std::to_string(found_.workspaceSize);
  }

 private:
  template <typename T>
  void set(cublasLtMatmulDescAttributes_t attribute, const T& value) {
    lt_.check(lt_.product_set(product_, attribute, &value, sizeof value),
              "cublasLtMatmulDescSetAttribute");
  }
  void set_scales(const float* of_weights, const float* of_rows) {
    set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, of_weights);
    set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, of_rows);
  }
  void set_size(int32_t rows, int32_t columns) {
    const auto set_count = [this](cublasLtMatrixLayout_t of,
                                  cublasLtMatrixLayoutAttribute_t attribute, int32_t number) {
      const auto count = static_cast<uint64_t>(number);
      lt_.check(lt_.layout_set(of, attribute, &count, sizeof count),
                "cublasLtMatrixLayoutSetAttribute");
    };
    set_count(rows_, CUBLASLT_MATRIX_LAYOUT_COLS, rows);
    set_count(weights_, CUBLASLT_MATRIX_LAYOUT_COLS, columns);
    set_count(result_, CUBLASLT_MATRIX_LAYOUT_COLS, rows);
    set_count(result_, CUBLASLT_MATRIX_LAYOUT_ROWS, columns);
  }
  template <typename T>
  void prefer(cublasLtMatmulPreferenceAttributes_t attribute, const T& value) {
    lt_.check(lt_.preference_set(preference_, attribute, &value, sizeof value),
              "cublasLtMatmulPreferenceSetAttribute");
  }
  void layout(cublasLtMatrixLayout_t* out, cudaDataType type, int64_t rows, int64_t columns,
              int64_t ld) {
    lt_.check(lt_.layout_create(out, type, static_cast<uint64_t>(rows),
                                static_cast<uint64_t>(columns), ld),
              "cublasLtMatrixLayoutCreate");
  }

  void make(const GemmArgs& args) {
    lt_.check(lt_.product_create(&product_, CUBLAS_COMPUTE_32F, CUDA_R_32F),
              "cublasLtMatmulDescCreate");
    set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
    if (args.bias != nullptr) {
      set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
      set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, args.bias);
    }
    if (args.fp8.a_scales != nullptr) {
      set(kScaleModeA, kOuterVectors);
      set(kScaleModeB, kOuterVectors);
      set_scales(args.fp8.b_scales, args.fp8.a_scales);
    }
    const GemmShape shape = shape_of(args);
    const cudaDataType type = args.is_fp8() ? CUDA_R_8F_E4M3 : CUDA_R_16BF;
    layout(&weights_, type, args.depth, shape.columns, args.ldb);
    layout(&rows_, type, args.depth, shape.rows, args.lda);
    layout(&result_, args.output == GemmOutput::kFloat ? CUDA_R_32F : CUDA_R_16BF, shape.columns,
           shape.rows, args.ldd);
    lt_.check(lt_.preference_create(&preference_), "cublasLtMatmulPreferenceCreate");
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, CublasLt::kWorkspaceBytes);
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reduction_schemes(shape));
    for (const auto attribute :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
      prefer(attribute, uint32_t{16});
    }
  }

  // Of the suggestions that can run all slices, the one with this index.
  void take_suggestion(cublasLtHandle_t handle, const GemmShape& shape, size_t suggestion) {
    std::array<cublasLtMatmulHeuristicResult_t, CublasLt::kSuggestions> found = {};
    int count = 0;
    lt_.check(lt_.get_heuristic(handle, product_, weights_, rows_, result_, result_, preference_,
                                static_cast<int>(found.size()), found.data(), &count),
              "cublasLtMatmulAlgoGetHeuristic");
    std::string reason = "there are " + std::to_string(count) + " for this product";
    for (const auto& one : std::span(found).first(static_cast<size_t>(count))) {
      found_ = one;
      try {
        check_slices(handle, shape);
      } catch (const std::runtime_error& error) {
        reason = error.what();
        continue;
      }
      if (suggestion-- == 0)
        return;
    }
    throw std::runtime_error("cublasLtMatmulAlgoGetHeuristic: no such suggestion: " + reason);
  }

  // A launch that is refused in the midst of an operator would give its other slices another
  // kernel.
  void check_slices(cublasLtHandle_t handle, const GemmShape& shape) {
    lt_.check(found_.state, "cublasLtMatmulAlgoGetHeuristic");
    check_rows(handle, 1, shape.columns);
    check_rows(handle, shape.rows == kRowClasses.back() ? kMostRows : shape.rows, shape.columns);
  }
  void check_rows(cublasLtHandle_t handle, int32_t rows, int32_t columns) {
    set_size(rows, columns);
    cublasLtMatmulHeuristicResult_t checked = {};
    lt_.check(lt_.check_algorithm(handle, product_, weights_, rows_, result_, result_, &found_.algo,
                                  &checked),
              "cublasLtMatmulAlgoCheck");
    if (checked.workspaceSize > CublasLt::kWorkspaceBytes) {
      throw std::runtime_error("cublasLtMatmulAlgoCheck: " + std::to_string(rows) + " rows want " +
                               std::to_string(checked.workspaceSize) + " bytes of workspace");
    }
  }

  void destroy() noexcept {
    if (preference_ != nullptr)
      lt_.preference_destroy(preference_);
    for (const cublasLtMatrixLayout_t made : {weights_, rows_, result_}) {
      if (made != nullptr)
        lt_.layout_destroy(made);
    }
    if (product_ != nullptr)
      lt_.product_destroy(product_);
  }

  const Functions& lt_;
  cublasLtMatmulDesc_t product_ = nullptr;
  cublasLtMatrixLayout_t weights_ = nullptr;
  cublasLtMatrixLayout_t rows_ = nullptr;
  cublasLtMatrixLayout_t result_ = nullptr;
  cublasLtMatmulPreference_t preference_ = nullptr;
  cublasLtMatmulHeuristicResult_t found_ = {};
};

using ProductKey = std::array<int64_t, 12>;

ProductKey key_of(const GemmArgs& args, size_t suggestion) {
  const GemmShape shape = shape_of(args);
  return {shape.rows,
          shape.columns,
          args.depth,
          args.lda,
          args.ldb,
          args.ldd,
          static_cast<int64_t>(args.output),
          args.adds_to_d,
          args.bias != nullptr,
          args.is_fp8(),
          args.fp8.a_scales != nullptr,
          static_cast<int64_t>(suggestion)};
}

}  // namespace

struct CublasLt::Library {
  Functions functions;
  cublasLtHandle_t handle = nullptr;
  Mutex mutex;
  // Rows and bias are set in the descriptors that are launched.
  std::map<ProductKey, std::unique_ptr<Product>> products FP_GUARDED_BY(mutex);

  Product& prepared(const GemmArgs& args, size_t suggestion) FP_REQUIRES(mutex) {
    const auto found = products.find(key_of(args, suggestion));
    if (found == products.end())
      throw std::runtime_error("cuBLASLt: this product was not prepared");
    return *found->second;
  }

  ~Library() {
    products.clear();
    if (handle != nullptr)
      functions.destroy(handle);
  }
};

CublasLt::CublasLt(std::unique_ptr<Library> library, size_t version)
    : library_(std::move(library)),
      version_("cublaslt " + std::to_string(version)),
      has_outer_scales_(version >= 120900) {}

CublasLt::~CublasLt() = default;

std::shared_ptr<const CublasLt> CublasLt::load(std::span<const std::string> libraries,
                                               std::string* reason) {
  *reason = "no library named";
  for (const std::string& name : libraries) {
    void* opened = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (opened == nullptr) {
      *reason = dlerror();
      continue;
    }
    auto library = std::make_unique<Library>();
    if (const char* missing = library->functions.find(opened); missing != nullptr) {
      *reason = name + ": has no " + missing;
      continue;
    }
    const size_t version = library->functions.get_version();
    if (version / 10000 != 12 && version / 10000 != 13) {
      *reason = name + ": version " + std::to_string(version) + ", expected 12 or 13";
      continue;
    }
    const cublasStatus_t status = library->functions.create(&library->handle);
    if (status != CUBLAS_STATUS_SUCCESS) {
      *reason = name + ": cublasLtCreate: " + library->functions.get_status_name(status);
      continue;
    }
    reason->clear();
    return std::shared_ptr<const CublasLt>(new CublasLt(std::move(library), version));
  }
  return nullptr;
}

bool CublasLt::takes(const GemmArgs& args) {
  if (args.is_fp8())
    return args.fp8.a != nullptr && !args.is_gated && args.bias == nullptr;
  return !args.is_gated && (args.bias == nullptr || args.output == GemmOutput::kFloat);
}

namespace {

void check_taken(const GemmArgs& args) {
  check(args);
  expect(CublasLt::takes(args), "bias", 1,
         "none where the output is bf16 or weights are FP8, no gate, and rows in FP8 with those");
}

}  // namespace

void CublasLt::prepare(const GemmArgs& args, size_t suggestion) const {
  check_taken(args);
  const ProductKey key = key_of(args, suggestion);
  {
    const MutexLock lock(library_->mutex);
    if (library_->products.contains(key))
      return;
    if (library_->products.size() == kMaxProducts) {
      throw std::runtime_error("cuBLASLt: " + std::to_string(kMaxProducts) +
                               " products are prepared, no more are kept");
    }
  }
  auto product = std::make_unique<Product>(library_->functions, library_->handle, args, suggestion);
  const MutexLock lock(library_->mutex);
  library_->products.try_emplace(key, std::move(product));
}

cudaError_t CublasLt::launch(const GemmArgs& args, std::span<std::byte> workspace,
                             cudaStream_t stream, size_t suggestion) const {
  check_taken(args);
  expect(workspace.size() >= kWorkspaceBytes, "workspace", static_cast<int64_t>(workspace.size()),
         "at least 32 MiB");
  const auto address = reinterpret_cast<uintptr_t>(workspace.data());
  expect(address % kWorkspaceAlignment == 0, "workspace's address", static_cast<int64_t>(address),
         "a multiple of 256");
  const MutexLock lock(library_->mutex);
  library_->prepared(args, suggestion).launch(library_->handle, args, workspace, stream);
  return cudaSuccess;
}

std::string CublasLt::config(const GemmArgs& args, size_t suggestion) const {
  check_taken(args);
  const MutexLock lock(library_->mutex);
  return library_->prepared(args, suggestion).config();
}

}  // namespace flowprefill

#else

namespace flowprefill {

struct CublasLt::Library {};

CublasLt::~CublasLt() = default;

std::shared_ptr<const CublasLt> CublasLt::load(std::span<const std::string>, std::string* reason) {
  *reason = "compiled without cublasLt.h";
  return nullptr;
}

bool CublasLt::takes(const GemmArgs&) {
  return false;
}

void CublasLt::prepare(const GemmArgs&, size_t) const {
  throw std::logic_error("CublasLt: compiled without cublasLt.h");
}

cudaError_t CublasLt::launch(const GemmArgs&, std::span<std::byte>, cudaStream_t, size_t) const {
  throw std::logic_error("CublasLt: compiled without cublasLt.h");
}

std::string CublasLt::config(const GemmArgs&, size_t) const {
  throw std::logic_error("CublasLt: compiled without cublasLt.h");
}

}  // namespace flowprefill

#endif
