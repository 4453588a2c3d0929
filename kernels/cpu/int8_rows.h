// Quantizes a row to int8, by the rules of qcli/ops/quantize_int8.py.
#pragma once

#include "simd.h"

namespace {

// Marks the outlier columns of a row. Returns the largest magnitude of the other columns.
template <class T>
float find_outliers(const T* row, int64_t columns, float threshold, uint8_t* outliers) {
  const float largest = absmax_of(row, columns);
  if (largest < threshold) return largest;  // false for NaN
  uint32_t kept = 0;
  for (int64_t i = 0; i < columns; i++) {
    const float magnitude = __builtin_fabsf(to_float(row[i]));
    if (magnitude >= threshold) {
      __atomic_store_n(&outliers[i], uint8_t(1), __ATOMIC_RELAXED);  // rows may do this in any order
    } else {
      kept = larger(kept, to_bits(magnitude));
    }
  }
  return from_bits(kept > kInfinity ? kNaN : kept);
}

template <class T>
void quantize_row(const T* row, int64_t columns, float absmax, int8_t* q) {
  if (!(absmax > 0 && absmax < from_bits(kInfinity))) {
    memset(q, 0, columns);
    return;
  }
  // Below 1e-30, 127 / absmax may overflow. Scaling by a power of two is exact.
  const float boost = absmax < 1e-30f ? 0x1p100f : 1.0f, scale = 1.0f / (absmax * boost) * 127.0f;
  int64_t i = 0;
  for (; i + 16 <= columns; i += 16) {
    __builtin_prefetch(row + columns + i);  // the next row
    store_bytes(q + i, rounded(load(row + i) * all(boost) * all(scale)));
  }
  if (i < columns) {
    T rest[16] = {};
    int8_t bytes[16];
    memcpy(rest, row + i, (columns - i) * sizeof(T));
    store_bytes(bytes, rounded(load(rest) * all(boost) * all(scale)));
    memcpy(q + i, bytes, columns - i);
  }
}

}  // namespace
