# fp_add_layer(target PUBLIC-libraries...): a static library of the .cc files beside the calling CMakeLists.txt.
# Files *.isa.cc are compiled once per instruction set (cmake/IsaLevels.cmake). Used by csrc/{ops,model,cpu}.

function(fp_add_layer target)
  file(GLOB sources CONFIGURE_DEPENDS *.cc)
  set(isa_sources ${sources})
  list(FILTER isa_sources INCLUDE REGEX "\\.isa\\.cc$")
  list(FILTER sources EXCLUDE REGEX "\\.isa\\.cc$")
  add_library(${target} STATIC ${sources})
  target_link_libraries(${target} PUBLIC ${ARGN})
  fp_add_isa_sources(${target} ${isa_sources})
endfunction()
