# What csrc/cuda/kernels needs to compile: CUTLASS's headers and the architectures. Included by that folder.
#
#   FP_CUDA_ARCHITECTURES   what the kernels are compiled for; default: sm_80, sm_90, sm_100 and PTX of sm_100.
#                           8.6 and 8.9 run the code of 8.0, 12.x compiles the PTX when it is first loaded.
#   CUTLASS_INCLUDE_DIR     folder with cutlass/cutlass.h; found in the package nvidia-cutlass of Python_EXECUTABLE
#                           (pip install --no-deps nvidia-cutlass==4.2.0.0)
#
# fp_cuda_kernel_options(target): flags of every target with .cu files.

set(FP_CUDA_ARCHITECTURES "80-real;90-real;100" CACHE STRING "Architectures of the CUDA kernels")

if(NOT CUTLASS_INCLUDE_DIR)
  # Importing the package would import all of its generator.
  set(_cutlass_query [=[
import importlib.util, pathlib
spec = importlib.util.find_spec("cutlass_library")
if spec is None or spec.origin is None:
    raise SystemExit("no cutlass_library")
print(pathlib.Path(spec.origin).parent / "source" / "include", end="")
]=])
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c "${_cutlass_query}"
    OUTPUT_VARIABLE CUTLASS_INCLUDE_DIR
    ERROR_QUIET)
endif()
if(NOT EXISTS "${CUTLASS_INCLUDE_DIR}/cutlass/cutlass.h")
  message(FATAL_ERROR "CUTLASS not found: pip install --no-deps nvidia-cutlass==4.2.0.0 for ${Python_EXECUTABLE}, "
                      "or -DCUTLASS_INCLUDE_DIR=FOLDER with cutlass/cutlass.h")
endif()

function(fp_cuda_kernel_options target)
  set_target_properties(${target} PROPERTIES CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF)
  target_include_directories(${target} PRIVATE "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/../csrc")
  target_include_directories(${target} SYSTEM PRIVATE "${CUTLASS_INCLUDE_DIR}")
  # 2908, 20012 and the like come from CUTLASS, which nvcc does not treat as a system header throughout.
  target_compile_options(
    ${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -diag-suppress=2908 -Xptxas=-warn-spills>)
endfunction()
