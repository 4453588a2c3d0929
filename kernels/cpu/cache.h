// The cache of keys and values of one layer, as rope_append fills it and attend reads it.
//
//   keys    [kv_heads, capacity, head_dim], values [kv_heads, capacity, v_dim]; float32, bfloat16, float16 or int8
//   scales  with int8 only: float32 [kv_heads, capacity] each; a row is its int8 values times its scale
//
// Position p is in slot p % capacity.
#pragma once

#include "functions.h"

namespace {

constexpr int kInt8 = 3;  // beside Dtype

struct Cache {
  void *keys, *values;
  float *key_scales, *value_scales;
  int64_t kv_heads, capacity, head_dim, v_dim, dtype;
};

}  // namespace

// Calls `function<T>(...)` with the element type of a cache.
#define QCLI_CACHE_DISPATCH(dtype, function, ...)                      \
  if ((dtype) == kInt8) {                                              \
    function<int8_t>(__VA_ARGS__);                                     \
  } else {                                                             \
    QCLI_DISPATCH(dtype, function, __VA_ARGS__)                        \
  }
