// Row-wise int8 quantization with outliers. The rules are in qcli/ops/quantize_int8.py.
//
//   q = round(x * (1 / absmax * 127)),   absmax = max |x| over the row's elements below the threshold
//
// One pass finds outliers and absmax. A second pass writes q; if there are few rows, it reads x from the cache. Without a threshold
// both passes are made row by row.

#include "int8_rows.h"

namespace {

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
