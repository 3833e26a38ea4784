# fp_cuda_kernel_options(target): flags of every target with .cu files. Included by csrc/devices/cuda/kernels. Needs
# CUTLASS_INCLUDE_DIR and FP_CUDA_ARCHITECTURES (CudaToolkit.cmake).
#
# Of the default architectures, 8.6 and 8.9 run the code of 8.0, and 12.x compiles the PTX of 10.0 when it is first
# loaded.

function(fp_cuda_kernel_options target)
  set_target_properties(${target} PROPERTIES CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF)
  target_include_directories(${target} PRIVATE "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/../csrc")
  target_include_directories(${target} SYSTEM PRIVATE "${CUTLASS_INCLUDE_DIR}")
  # 2908, 20012 and the like come from CUTLASS, which nvcc does not treat as a system header throughout.
  target_compile_options(
    ${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -diag-suppress=2908 -Xptxas=-warn-spills>)
endfunction()
