# Decides whether _cuda is built, and finds what that needs. Included by the top CMakeLists.txt after Python is found.
#
#   FP_CUDA=AUTO   built if everything it needs is found *and* this machine has a use for it: an NVIDIA driver, or a
#                  torch with CUDA. Else not: a compiler that happens to lie in PATH must not cost a CPU build minutes.
#   FP_CUDA=ON     built; what is missing stops the configuration, all of it named at once.
#   FP_CUDA=OFF    never built.
#
# Sets FP_CUDA_ENABLED; if it is on, CMAKE_CUDA_COMPILER, CUDA_INCLUDE_DIR, FP_CUDART (the static runtime: no other is
# needed where the module runs) and CUTLASS_INCLUDE_DIR. Nothing that is found is cached, so a build folder follows
# its environment. CUDA_HOME (or CUDA_PATH), if set, is the only place looked at for the toolkit.

set(FP_CUDA AUTO CACHE STRING "Build the module for GPUs: AUTO, ON or OFF")
set_property(CACHE FP_CUDA PROPERTY STRINGS AUTO ON OFF)
if(NOT FP_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "FP_CUDA: got '${FP_CUDA}', expected AUTO, ON or OFF")
endif()
set(_default_architectures "80-real;90-real;100")
set(FP_CUDA_ARCHITECTURES "${_default_architectures}" CACHE STRING "Architectures of the CUDA kernels")
set(_architecture "([89]|1[0-9])[0-9]a?(-real|-virtual)?")
if(NOT FP_CUDA_ARCHITECTURES MATCHES "^(native|${_architecture}(;${_architecture})*)$")
  message(FATAL_ERROR "FP_CUDA_ARCHITECTURES: got '${FP_CUDA_ARCHITECTURES}', expected native, or a list as "
                      "${_default_architectures}, none below 80")
endif()

# Sets in the caller: _root, the first folder that is a whole toolkit, else "".
function(_fp_find_toolkit_root)
  set(roots "$ENV{CUDA_HOME}" "$ENV{CUDA_PATH}")
  list(REMOVE_ITEM roots "")
  if(NOT roots)
    find_program(nvcc_in_path nvcc NO_CACHE)
    if(nvcc_in_path)
      file(REAL_PATH "${nvcc_in_path}" nvcc_in_path)
      cmake_path(GET nvcc_in_path PARENT_PATH folder)
      cmake_path(GET folder PARENT_PATH folder)
      list(APPEND roots "${folder}")
    endif()
    file(GLOB installed /usr/local/cuda*)
    file(GLOB packaged "${Python_SITELIB}/nvidia/cu13")
    list(APPEND roots ${installed} ${packaged})
  endif()
  set(_toolkit_places "${roots}" PARENT_SCOPE)
  set(_root "" PARENT_SCOPE)
  foreach(root IN LISTS roots)
    file(GLOB static "${root}/lib64/libcudart_static.a" "${root}/lib/libcudart_static.a")
    if(EXISTS "${root}/bin/nvcc" AND EXISTS "${root}/include/cuda_runtime_api.h" AND static)
      list(GET static 0 static)
      set(_root "${root}" PARENT_SCOPE)
      set(_cudart "${static}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
endfunction()

# Sets in the caller: CUTLASS_INCLUDE_DIR, unless it was given. Importing the package would import its generator.
function(_fp_find_cutlass)
  set(query [=[
import importlib.util, pathlib
spec = importlib.util.find_spec("cutlass_library")
if spec is None or spec.origin is None:
    raise SystemExit("no cutlass_library")
print(pathlib.Path(spec.origin).parent / "source" / "include", end="")
]=])
  if(NOT CUTLASS_INCLUDE_DIR)
    execute_process(COMMAND "${Python_EXECUTABLE}" -c "${query}" OUTPUT_VARIABLE folder ERROR_QUIET)
    set(CUTLASS_INCLUDE_DIR "${folder}" PARENT_SCOPE)
  endif()
endfunction()

# Sets in the caller: FLASHINFER_DATA_DIR, unless it was given: the headers of Hopper's attention, empty where there are
# none. Importing the package would import torch.
function(_fp_find_flashinfer)
  set(query [=[
import importlib.util, pathlib
spec = importlib.util.find_spec("flashinfer")
if spec is None or spec.origin is None:
    raise SystemExit("no flashinfer")
print(pathlib.Path(spec.origin).parent / "data", end="")
]=])
  if(NOT FLASHINFER_DATA_DIR)
    execute_process(COMMAND "${Python_EXECUTABLE}" -c "${query}" OUTPUT_VARIABLE folder ERROR_QUIET)
    if(EXISTS "${folder}/include/flashinfer/attention/hopper/prefill_sm90.cuh")
      set(FLASHINFER_DATA_DIR "${folder}" PARENT_SCOPE)
    endif()
  endif()
endfunction()

# Sets in the caller: FP_CUDA_MISSING, a list of what the build lacks, one sentence each.
function(_fp_list_missing)
  set(missing)
  if(NOT _root)
    list(JOIN _toolkit_places ", " places)
    list(APPEND missing
         "a CUDA toolkit (bin/nvcc, include/cuda_runtime_api.h, lib64/libcudart_static.a): none in ${places}. \
Set CUDA_HOME, or pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl")
  endif()
  if(NOT EXISTS "${CUTLASS_INCLUDE_DIR}/cutlass/cutlass.h")
    list(APPEND missing
         "the headers of CUTLASS: pip install --no-deps nvidia-cutlass==4.2.0.0 for ${Python_EXECUTABLE}, \
or set CUTLASS_INCLUDE_DIR to the folder with cutlass/cutlass.h")
  endif()
  set(FP_CUDA_MISSING "${missing}" PARENT_SCOPE)
endfunction()

# Sets in the caller: _use, why this machine may want the module; empty: it has no use for it.
function(_fp_find_use)
  set(_use "" PARENT_SCOPE)
  if(EXISTS /proc/driver/nvidia/version OR EXISTS /dev/nvidiactl OR EXISTS /dev/dxg)
    set(_use "an NVIDIA driver" PARENT_SCOPE)
  elseif(TorchWheel_CUDA)
    set(_use "a torch with CUDA ${TorchWheel_CUDA}" PARENT_SCOPE)
  endif()
endfunction()

set(FP_CUDA_ENABLED OFF)
if(FP_CUDA STREQUAL "OFF")
  message(STATUS "_cuda: not built (FP_CUDA=OFF)")
else()
  _fp_find_use()
  if(FP_CUDA STREQUAL "ON" OR _use)
    _fp_find_toolkit_root()
    _fp_find_cutlass()
    _fp_find_flashinfer()
    _fp_list_missing()
    list(JOIN FP_CUDA_MISSING "\n  - " _shown)
    if(NOT FP_CUDA_MISSING)
      set(FP_CUDA_ENABLED ON)
      message(STATUS "_cuda: built for ${FP_CUDA_ARCHITECTURES} with ${_root}/bin/nvcc")
      if(NOT FLASHINFER_DATA_DIR)
        message(STATUS "_cuda: without attention for Hopper (pip install --no-deps flashinfer-python==0.7.2.post1)")
      endif()
    elseif(FP_CUDA STREQUAL "ON")
      message(FATAL_ERROR "FLOWPREFILL_CUDA=1 (FP_CUDA=ON) asks for the CUDA module. Missing:\n  - ${_shown}")
    else()
      message(STATUS "_cuda: not built, though there is ${_use}. Missing:\n  - ${_shown}")
    endif()
  else()
    message(STATUS "_cuda: not built, no NVIDIA driver and no torch with CUDA; FLOWPREFILL_CUDA=1 builds it all the same")
  endif()
endif()
set(FP_CUDA_ENABLED "${FP_CUDA_ENABLED}" CACHE INTERNAL "for setup.py")

if(FP_CUDA_ENABLED)
  set(CMAKE_CUDA_COMPILER "${_root}/bin/nvcc")
  set(CUDA_INCLUDE_DIR "${_root}/include")
  set(FP_CUDART "${_cudart}")
  set(CMAKE_CUDA_ARCHITECTURES 80-real) # for CMake's try; each target names its own
  set(CMAKE_CUDA_RUNTIME_LIBRARY None)  # _cuda names it
endif()
