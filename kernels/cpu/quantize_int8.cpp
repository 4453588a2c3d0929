// Row-wise int8 quantization with outliers; the rules are in qcli/ops/quantize_int8.py.
//
//   q = round(x * (1 / absmax * 127)),   absmax = max |x| over the row's elements below the threshold
//
// One pass finds outliers and absmax, a second, from cache where rows are few, writes q. Without a threshold both are done
// row by row.

#include <cstdlib>

#include "simd.h"

namespace {

// Marks the outlier columns of a row; returns the largest magnitude of the rest.
template <class T>
float find_outliers(const T* row, int64_t columns, float threshold, uint8_t* outliers) {
  const float largest = absmax_of(row, columns);
  if (largest < threshold) return largest;  // not where it is NaN
  uint32_t kept = 0;
  for (int64_t i = 0; i < columns; i++) {
    const float magnitude = std::fabs(to_float(row[i]));
    if (magnitude >= threshold) {
      __atomic_store_n(&outliers[i], uint8_t(1), __ATOMIC_RELAXED);  // by any row, in any order
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
  // 127 / absmax may overflow below 1e-30; a power of two is exact.
  const float boost = absmax < 1e-30f ? 0x1p100f : 1.0f, scale = 1.0f / (absmax * boost) * 127.0f;
  int64_t i = 0;
  for (; i + 16 <= columns; i += 16) store_bytes(q + i, rounded(load(row + i) * all(boost) * all(scale)));
  if (i < columns) {
    T rest[16] = {};
    int8_t bytes[16];
    memcpy(rest, row + i, (columns - i) * sizeof(T));
    store_bytes(bytes, rounded(load(rest) * all(boost) * all(scale)));
    memcpy(q + i, bytes, columns - i);
  }
}

template <class T>
void quantize(const void* input, int64_t rows, int64_t columns, float threshold, int8_t* q, float* absmax,
              uint8_t* outliers, int threads) {
  const T* x = static_cast<const T*>(input);
  const int64_t grain = divide_up(1 << 15, larger<int64_t>(columns, 1));
  if (!(threshold > 0)) {
    parallel(rows, grain, threads, [=](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; r++) {
        absmax[r] = absmax_of(x + r * columns, columns);
        quantize_row(x + r * columns, columns, absmax[r], q + r * columns);
      }
    });
    return;
  }
  parallel(rows, grain, threads, [=](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) absmax[r] = find_outliers(x + r * columns, columns, threshold, outliers);
  });
  parallel(rows, grain, threads, [=](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
      int8_t* to = q + r * columns;
      quantize_row(x + r * columns, columns, absmax[r], to);
      for (int64_t i = 0; i < columns; i++) to[i] = outliers[i] ? int8_t(0) : to[i];
    }
  });
}

}  // namespace

// x [rows, columns] of `dtype`; q int8 [rows, columns]; absmax float32 [rows]; outliers [columns], zeroed by the caller.
QCLI_KERNEL(quantize_int8)
(const void* x, int dtype, int64_t rows, int64_t columns, float threshold, int8_t* q, float* absmax, uint8_t* outliers,
 int threads) {
  QCLI_DISPATCH(dtype, quantize, x, rows, columns, threshold, q, absmax, outliers, threads)
}
