# fp_add_sharded_test(target timeout_s): adds a GoogleTest program to ctest as two halves, by GoogleTest's own sharding: one core
# each under `ctest -j 2`. FP_SHARDS has their names afterwards. Included by suites in tests/ whose tests take long.

function(fp_add_sharded_test target timeout_s)
  set(shards "")
  foreach(index 0 1)
    set(name ${target}_${index})
    add_test(NAME ${name} COMMAND ${target})
    set_tests_properties(${name} PROPERTIES TIMEOUT ${timeout_s} ENVIRONMENT "GTEST_TOTAL_SHARDS=2;GTEST_SHARD_INDEX=${index}")
    list(APPEND shards ${name})
  endforeach()
  set(FP_SHARDS ${shards} PARENT_SCOPE)
endfunction()
