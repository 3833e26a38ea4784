# Language standard, optimisation, debug information, warnings and hardening of every target. Included by the top
# CMakeLists.txt and by the suites in tests/.

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

# Hardening. Debug builds and sanitizers are left out of _FORTIFY_SOURCE: it needs optimisation, and its checked
# functions hide accesses from a sanitizer.
set(fortify 2)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_GREATER_EQUAL 12)
  set(fortify 3)
endif()
if(NOT FP_SANITIZE AND NOT CMAKE_BUILD_TYPE STREQUAL "Debug")
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-U_FORTIFY_SOURCE> $<$<COMPILE_LANGUAGE:CXX>:-D_FORTIFY_SOURCE=${fortify}>)
endif()
add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fstack-protector-strong>)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fcf-protection=full>)
endif()
# The product alone is built without the standard library's own checks; each suite is a project of its own.
if(NOT PROJECT_NAME STREQUAL "flowprefill")
  add_compile_definitions(_GLIBCXX_ASSERTIONS)
endif()

add_link_options(-Wl,--as-needed -Wl,-z,relro,-z,now)
