// Binds what is asked of the CUDA runtime before there is a model: which GPUs there are, and if
// none can be used, why.
#include <cstdlib>
#include <string>
#include <utility>

#include "bindings/module.h"
#include "devices/cuda/runtime/cuda_error.h"

namespace py = pybind11;

namespace flowprefill {
namespace {

constexpr int kMinMajor = 8;  // of the compute capability: bf16 in the tensor cores, cp.async

// 13000 -> "13.0", as cudaDriverGetVersion() and cudaRuntimeGetVersion() count.
std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

cudaDeviceProp properties_of(int device) {
  cudaDeviceProp properties = {};
  FP_CUDA(cudaGetDeviceProperties(&properties, device));
  return properties;
}

// Why the runtime shows no device at all.
std::string no_device_reason(cudaError_t code) {
  const int driver = driver_version();
  if (code != cudaSuccess && driver == 0)
    return "no NVIDIA driver: libcuda.so.1 cannot be loaded";
  if (code == cudaErrorInsufficientDriver) {
    return "the NVIDIA driver is too old: it supports CUDA " + version_text(driver) +
           ", this build needs " + version_text(runtime_version());
  }
  if (code == cudaErrorNoDevice || code == cudaSuccess) {
    const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
    return visible == nullptr ? "the NVIDIA driver sees no GPU"
                              : "the NVIDIA driver shows no GPU (CUDA_VISIBLE_DEVICES is '" +
                                    std::string(visible) + "')";
  }
  return std::string("cudaGetDeviceCount: ") + cudaGetErrorName(code) + ": " +
         cudaGetErrorString(code);
}

int device_count() {
  int count = 0;
  const cudaError_t code = cudaGetDeviceCount(&count);
  ignore(code);
  return code == cudaSuccess ? count : 0;
}

std::string range_text(int count) {
  return count == 1 ? "there is one, cuda:0"
                    : "there are " + std::to_string(count) +
                          ", cuda:0 to cuda:" + std::to_string(count - 1);
}

std::pair<bool, std::string> availability(int device) {
  int count = 0;
  const cudaError_t code = cudaGetDeviceCount(&count);
  ignore(code);
  if (code != cudaSuccess || count == 0)
    return {false, no_device_reason(code)};
  if (device < 0 || device >= count)
    return {false, "no GPU with this number: " + range_text(count)};
  try {
    const cudaDeviceProp found = properties_of(device);
    const std::string name = found.name;
    const std::string shown = std::to_string(found.major) + "." + std::to_string(found.minor);
    if (found.major < kMinMajor)
      return {false, name + " has compute capability " + shown + ", 8.0 or higher is needed"};
    return {true, name + ", compute capability " + shown};
  } catch (const CudaError& error) {
    return {false, error.what()};
  }
}

py::dict device_info(int device) {
  size_t free_bytes = 0;
  size_t total_bytes = 0;
  FP_CUDA(cudaSetDevice(device));
  FP_CUDA(cudaMemGetInfo(&free_bytes, &total_bytes));
  const cudaDeviceProp found = properties_of(device);
  py::dict d;
  d["name"] = found.name;
  d["compute_capability"] = py::make_tuple(found.major, found.minor);
  d["multiprocessors"] = found.multiProcessorCount;
  d["memory_bytes"] = total_bytes;
  d["free_bytes"] = free_bytes;
  d["driver_version"] = version_text(driver_version());
  d["runtime_version"] = version_text(runtime_version());
  return d;
}

}  // namespace

void bind_cuda_devices(py::module_& m) {
  m.def("device_count", &device_count);
  m.def("availability", &availability, py::arg("device") = 0);
  m.def("device_info", &device_info, py::arg("device") = 0);
  m.attr("architectures") = FP_CUDA_ARCHITECTURES;
}

}  // namespace flowprefill
