// A weight whose codes name entries of a table, as linear_table reads it: its rows, their tables in the form that look-ups take, and
// the order of x that goes with each form.
#pragma once

#include "planes.h"
#include "sparse.h"

namespace {

// The layout is that of the Record in qcli/ops/linear_table.py.
struct Weight {
  const uint8_t* packed;  // [out_features, row_bytes()]
  const float* table;     // [2^bits], or [out_features, 2^bits]
  const float* absmax;    // [out_features, groups], or null
  const float* zero;      // likewise
  Bias bias;              // [out_features]
  int64_t bits, own_tables, block_size, out_features, k;
  const Sparse* sparse;  // what is added besides, or null
  int32_t coarse;        // the compute dtype is bfloat16

  QCLI_INLINE int64_t row_bytes() const { return divide_up(k, kUnit) * unit_bytes(int(bits)); }
  QCLI_INLINE int64_t groups() const { return divide_up(k, block_size); }
  QCLI_INLINE const float* table_of(int64_t n) const { return table + (own_tables ? n << bits : 0); }
};

using Floats = Float32<PlaneOrder>;

// Columns of a row that may be read, where there are k.
QCLI_INLINE int64_t read_columns(int64_t k) { return divide_up(k, 256) * 256; }

// Which weights share a scale.
enum class Scaling { kRow, kUnits, kHalves };  // those of a row, of units of 64 columns at least, of 32 columns at least

struct Row {
  const uint8_t* packed;
  const float* absmax;  // of its groups, or null
  float entries[16];
#if defined(QCLI_INT16_PRODUCTS)
  Codes16 codes;
  float unit;  // of the entries in codes, times kCodeSteps
#if defined(__AVX512F__)
  FourTables four;  // in place of codes, with 2 and 3 bits
#endif
#endif

  QCLI_INLINE float scale(int32_t group) const { return absmax ? absmax[group] : 1.0f; }
};

#if defined(QCLI_INT16_PRODUCTS)
using Ints = Integers<PlaneOrder>;

// How many steps the largest magnitude of a table has, at most. Integers in a table stay integers: the number of steps to 1 is a whole
// one, if it is at least 1. The unit of a table that is not finite is NaN.
struct Steps {
  float to_one, unit;
  Steps(const float* entries, float most) {
    const float largest = absmax_of(entries, 16), steps = most / larger(largest, 1e-30f);
    to_one = steps >= 1 && steps < 1e9f ? float(int32_t(steps)) : steps;
    unit = kCodeSteps / to_one + (largest - largest);
  }
};
#if defined(__AVX512F__)
using FourInts = Integers<FourOrder, kFour>;
constexpr float kFourSteps = 4095;  // 16 * 4095 * 32767 is within int32

template <int kBits>
QCLI_INLINE void set_table(Row* row, const FourInts*) {
  const Steps steps(row->entries, kFourSteps);
  row->four = four_tables<kBits>(_mm512_cvtepi32_epi16(rounded(load(row->entries) * all(steps.to_one)).v));
  row->unit = steps.unit;
}
#endif
template <int kBits>
QCLI_INLINE void set_table(Row* row, const Ints*) {
  const Steps steps(row->entries, kCodeSteps);
  row->codes = codes_of(row->entries, steps.to_one);
  row->unit = steps.unit;
}
// How x lies for codes of some bits.
template <int kBits>
struct IntsOf {
  using Type = Ints;
};
#if defined(__AVX512F__)
template <>
struct IntsOf<2> {
  using Type = FourInts;
};
template <>
struct IntsOf<3> {
  using Type = FourInts;
};
#endif
#endif
template <int kBits>
QCLI_INLINE void set_table(Row*, const Floats*) {}

// What does not depend on rows.
template <class X>
struct Given {
  const Weight& w;
  const X& x;
  const int32_t* groups;  // of every 32 columns that are read
};

}  // namespace
