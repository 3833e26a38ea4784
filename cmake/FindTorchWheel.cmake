# Locates torch as pip installed it and makes imported targets for it. Included by the top CMakeLists.txt.
#
# torch's own TorchConfig.cmake is not used: it looks for the whole CUDA toolkit whenever the wheel was built with
# CUDA, even for code that only needs the CPU half. Two libraries and two folders of headers are all we need.
#
#   torch::cpu      libtorch_cpu, libc10 and the headers; among them the pybind11 that the wheel was built with
#   torch::pybind11 the headers of pybind11 alone; links nothing
#
# Needs Python_EXECUTABLE. Sets TorchWheel_VERSION, TorchWheel_CUDA (CUDA's version, empty: none),
# TorchWheel_LIBRARY_DIR and TorchWheel_RPATH, the run path by which a module finds these libraries: in this
# environment if FP_IN_PLACE, else in that of the folder site-packages/flowprefill/ it is installed to. Nothing is cached,
# so a build folder follows its environment.

# Importing torch takes seconds; its place and version.py say the same.
set(_torch_query [=[
import importlib.util, pathlib, runpy
spec = importlib.util.find_spec("torch")
if spec is None:
    raise SystemExit("no torch")
folder = pathlib.Path(spec.origin).parent
version = runpy.run_path(str(folder / "version.py"))
print(folder, version["__version__"].partition("+")[0], version.get("cuda") or "", sep=";", end="")
]=])
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c "${_torch_query}"
  OUTPUT_VARIABLE _torch_found
  RESULT_VARIABLE _torch_status
  ERROR_QUIET)
if(_torch_status EQUAL 0)
  list(GET _torch_found 0 _torch_dir)
  list(GET _torch_found 1 TorchWheel_VERSION)
  list(GET _torch_found 2 TorchWheel_CUDA)
  set(TorchWheel_LIBRARY_DIR "${_torch_dir}/lib")
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  TorchWheel
  REQUIRED_VARS TorchWheel_LIBRARY_DIR
  VERSION_VAR TorchWheel_VERSION
  REASON_FAILURE_MESSAGE "${Python_EXECUTABLE} has no torch (or an older one): pip install torch==2.13.0")

# An imported shared library of the wheel. Imported targets count as system headers: their warnings are not ours.
function(_torch_library target file)
  if(NOT EXISTS "${TorchWheel_LIBRARY_DIR}/${file}")
    message(FATAL_ERROR "torch ${TorchWheel_VERSION} has no ${TorchWheel_LIBRARY_DIR}/${file}")
  endif()
  add_library(${target} SHARED IMPORTED GLOBAL)
  set_target_properties(${target} PROPERTIES IMPORTED_LOCATION "${TorchWheel_LIBRARY_DIR}/${file}")
endfunction()

if(TorchWheel_FOUND AND NOT TARGET torch::cpu)
  _torch_library(torch::c10 libc10.so)
  _torch_library(torch::cpu libtorch_cpu.so)
  target_include_directories(
    torch::c10 INTERFACE "${_torch_dir}/include" "${_torch_dir}/include/torch/csrc/api/include")
  target_compile_definitions(torch::c10 INTERFACE _GLIBCXX_USE_CXX11_ABI=1)
  target_link_libraries(torch::cpu INTERFACE torch::c10)
  # Not torch's whole folder of headers: a target that wants pybind11 must not see ATen.
  file(MAKE_DIRECTORY "${PROJECT_BINARY_DIR}/pybind11-headers")
  file(CREATE_LINK "${_torch_dir}/include/pybind11" "${PROJECT_BINARY_DIR}/pybind11-headers/pybind11" SYMBOLIC)
  add_library(torch::pybind11 INTERFACE IMPORTED GLOBAL)
  target_include_directories(torch::pybind11 INTERFACE "${PROJECT_BINARY_DIR}/pybind11-headers")

  set(TorchWheel_RPATH "${TorchWheel_LIBRARY_DIR}")
  if(NOT FP_IN_PLACE)
    set(TorchWheel_RPATH "$ORIGIN/../torch/lib")
  endif()
endif()
