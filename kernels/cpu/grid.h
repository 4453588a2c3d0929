// The values that codes of a weight may stand for under a scale, and the nearest of them. The rules are in
// qcli/ops/gptq_columns.py.
#pragma once

#include "rounding.h"
#include "small_floats.h"

namespace {

enum Form : int { kIntegers = 0, kTable = 1, kOfE4M3 = 2, kOfE2M1 = 3 };

// Integers have codes in [least, most]; a table has 15 thresholds, and 16 values and codes in their order. What codes stand for is
// rounded to `dtype`.
struct Grid {
  float least, most;
  const float *thresholds, *values, *codes_of_ranks;
  int dtype;
};

// A table in the order of its search, or zeros.
struct Ranks {
  Search16 tree;
  float values[16], codes[16];
};
Ranks ranks_of(const Grid& grid) {
  Ranks ranks = {};
  if (grid.thresholds) {
    ranks.tree = search16(grid.thresholds);
    memcpy(ranks.values, grid.values, sizeof ranks.values);
    memcpy(ranks.codes, grid.codes_of_ranks, sizeof ranks.codes);
  }
  return ranks;
}
struct Tables {
  Table16 tree, values, codes;
};
QCLI_INLINE Tables tables_of(const Ranks& ranks) {
  return {table16(ranks.tree.tree), table16(ranks.values), table16(ranks.codes)};
}

// What weights are divided by for their codes.
template <int kForm>
QCLI_INLINE F32x16 divisor(F32x16 scale) {
  return kForm == kIntegers ? scale : maximum(scale, all(0x1p-126f));
}

// The code of v, which becomes what the code stands for in units of the scale.
template <int kForm>
QCLI_INLINE I32x16 nearest_code(F32x16* v, F32x16 zero, const Grid& grid, const Tables& tables) {
  const F32x16 x = where_number(*v, *v, all(0.0f));
  if (kForm == kTable) {
    const I32x16 rank = rank16(tables.tree, x);
    *v = look_up<0>(tables.values, rank);
    return rounded(look_up<0>(tables.codes, rank));
  }
  if (kForm == kIntegers) {
    const F32x16 far = all(65536.0f), magic = all(12582912.0f);  // a sum with it rounds to an integer, ties to even
    const F32x16 whole = minimum(maximum(x, all(0.0f) - far), far) + magic - magic;
    const F32x16 code = minimum(maximum(whole + zero, all(grid.least)), all(grid.most));
    *v = code - zero;
    return rounded(code);
  }
  const float most = kForm == kOfE4M3 ? kE4M3Most : kE2M1Most;
  *v = minimum(maximum(x, all(-most)), all(most));
  return kForm == kOfE4M3 ? round_to<E4M3>(v) : round_to<E2M1>(v);
}

QCLI_INLINE F32x16 as_stored(int dtype, F32x16 x) {
  if (dtype == kBFloat16) return through(static_cast<const bf16*>(nullptr), x);
  return dtype == kFloat16 ? through(static_cast<const f16*>(nullptr), x) : x;
}

template <int kForm>
QCLI_INLINE void store_codes_of(uint8_t* codes, I32x16 code, int64_t count) {
  if (kForm == kIntegers) {
    store_some_bytes(reinterpret_cast<int8_t*>(codes), code, count);
  } else {
    store_some_bytes(codes, code, count);
  }
}

}  // namespace

// Calls `function<form>(...)`.
#define QCLI_FORM(form, function, ...)                       \
  switch (form) {                                            \
    case kIntegers: function<kIntegers>(__VA_ARGS__); break; \
    case kTable: function<kTable>(__VA_ARGS__); break;       \
    case kOfE4M3: function<kOfE4M3>(__VA_ARGS__); break;     \
    case kOfE2M1: function<kOfE2M1>(__VA_ARGS__); break;     \
  }
