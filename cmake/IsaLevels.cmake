# fp_add_isa_sources(target file...): compiles each file once per instruction set into `target`. Used by csrc/devices/cpu
# and by the test of its row kernels.
#
# One build has to run on every x86-64 machine and still use what the machine at hand offers. A file `x.isa.cc`
# puts its functions into namespace FP_ISA_NAMESPACE (isa_baseline, isa_avx2, isa_avx512, isa_avx512bf16)
# and a dispatcher, an ordinary file, calls one of them. FP_ISA_LEVELS tells it how many there are: 4 on x86-64,
# otherwise 1.
#
# Such a file must not instantiate inline functions or templates that others instantiate too (std::vector, ATen):
# the linker keeps one copy of each, perhaps the AVX-512 one, and an older machine would execute it. A test reads
# the symbol tables (tests/unit/test_packaging.py).

set(FP_ISA_NAMES baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND FP_ISA_NAMES avx2 avx512 avx512bf16)
endif()
list(LENGTH FP_ISA_NAMES FP_ISA_COUNT)

set(FP_ISA_FLAGS_avx2 -march=x86-64-v3)
set(FP_ISA_FLAGS_avx512 -march=x86-64-v4)
set(FP_ISA_FLAGS_avx512bf16 -march=x86-64-v4 -mavx512bf16)

# What lets sums be vectorised. Not -ffast-math: infinities and NaN keep their meaning (masks are -inf).
set(FP_ISA_FLAGS
    -ffp-contract=fast
    -fno-math-errno
    -fno-trapping-math
    -fassociative-math
    -fno-signed-zeros
    -freciprocal-math)
if(NOT FP_SANITIZE) # Sanitizers.cmake says why
  list(PREPEND FP_ISA_FLAGS -O3)
endif()

function(fp_add_isa_sources target)
  target_compile_definitions(${target} PUBLIC FP_ISA_LEVELS=${FP_ISA_COUNT})
  if(NOT ARGN)
    return()
  endif()
  foreach(isa IN LISTS FP_ISA_NAMES)
    set(objects ${target}_${isa})
    add_library(${objects} OBJECT ${ARGN})
    target_compile_definitions(${objects} PRIVATE FP_ISA_NAMESPACE=isa_${isa} FP_ISA_LEVELS=${FP_ISA_COUNT})
    target_compile_options(${objects} PRIVATE ${FP_ISA_FLAGS} ${FP_ISA_FLAGS_${isa}})
    if(TARGET torch::cpu) # not in the C++ tests, whose files need no torch
      target_link_libraries(${objects} PRIVATE torch::cpu)
    endif()
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${objects}>)
  endforeach()
endfunction()
