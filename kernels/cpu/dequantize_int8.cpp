// Row-wise int8 dequantization: q * (absmax * (1 / 127)) in float32, rounded once to the wanted dtype.

#include "simd.h"

namespace {

template <class T>
void dequantize(const int8_t* q, const float* absmax, int64_t rows, int64_t columns, void* output, int threads) {
  T* out = static_cast<T*>(output);
  parallel(rows, divide_up(1 << 15, larger<int64_t>(columns, 1)), threads, [=](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
      const int8_t* row = q + r * columns;
      T* to = out + r * columns;
      const float step = absmax[r] * float(1.0 / 127);
      int64_t i = 0;
      for (; i + 16 <= columns; i += 16) store(to + i, load(row + i) * all(step));
      for (; i < columns; i++) from_float(float(row[i]) * step, &to[i]);
    }
  });
}

}  // namespace

// q int8 [rows, columns]; absmax float32 [rows]; out [rows, columns] of `dtype`.
QCLI_KERNEL(dequantize_int8)
(const int8_t* q, const float* absmax, int64_t rows, int64_t columns, int dtype, void* out, int threads) {
  QCLI_DISPATCH(dtype, dequantize, q, absmax, rows, columns, out, threads)
}
