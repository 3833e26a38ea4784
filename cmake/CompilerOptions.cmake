# Language standard, optimisation, debug information and warnings of every target. Included by the top CMakeLists.txt.

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)

# One optimised build with function names and line tables: enough for gdb and perf, a fifth of the size of -g.
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE RelWithDebInfo CACHE STRING "Debug, Release or RelWithDebInfo" FORCE)
endif()
set(CMAKE_CXX_FLAGS_RELWITHDEBINFO "-O2 -g1 -DNDEBUG")

add_compile_options(-Wall -Wextra)
if(FP_WERROR)
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-Werror>) # nvcc's own -Werror wants a list, and CUTLASS warns
endif()

add_link_options(-Wl,--as-needed)
