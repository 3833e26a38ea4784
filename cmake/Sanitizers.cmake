# FP_SANITIZE: builds everything after the include with compiler sanitizers. Included by tests/cpp/CMakeLists.txt, after
# CompilerOptions and before IsaLevels.

set(FP_SANITIZE "" CACHE STRING "empty, thread, address or address,undefined")
set_property(CACHE FP_SANITIZE PROPERTY STRINGS "" thread address undefined address,undefined)

if(FP_SANITIZE)
  if(NOT FP_SANITIZE MATCHES "^(thread|((address|undefined)(,(address|undefined))?))$")
    message(FATAL_ERROR "FP_SANITIZE: got '${FP_SANITIZE}', expected thread, address, undefined or address,undefined")
  endif()
  add_compile_options(-fsanitize=${FP_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all)
  add_link_options(-fsanitize=${FP_SANITIZE})
  # -O1 leaves more accesses for them to watch than -O2, and at -O3 the checks in the row kernels take nine times as long
  # to compile.
  set(CMAKE_CXX_FLAGS_RELWITHDEBINFO "-O1 -g1 -DNDEBUG")
endif()
