// The error of row-wise int8 quantization. The definition is in qcli/ops/error_int8.py.
//
// Per row, in units of its absmax: the sums of (w - q absmax / 127)^2 and w^2, in a fixed order.

#include "simd.h"

namespace {

constexpr int64_t kRun = 1024;  // elements that are added in float32; float64 adds these sums

template <class T>
void measure(const void* input, int64_t rows, int64_t columns, const int8_t* q, const float* absmax, double* sums,
             int threads) {
  const T* x = static_cast<const T*>(input);
  parallel(rows, divide_up(1 << 15, larger<int64_t>(columns, 1)), threads, [=](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
      const T* row = x + r * columns;
      const int8_t* codes = q + r * columns;
      const float scale = absmax[r];
      double error = 0, norm = 0;
      int64_t nonfinite = 0, i = 0;
      if (scale > 1e-37f && scale < 3e38f) {
        const F32x16 unit = all(1.0f / scale), step = all(float(1.0 / 127));
        while (i + 16 <= columns) {
          F32x16 errors = all(0.0f), norms = errors;
          for (const int64_t stop = i + kRun; i + 16 <= columns && i < stop; i += 16) {
            const F32x16 v = load(row + i) * unit, difference = v - load(codes + i) * step;
            errors = errors + difference * difference;
            norms = norms + v * v;
          }
          error += sum_lanes(errors);
          norm += sum_lanes(norms);
        }
        error *= double(scale) * scale;
        norm *= double(scale) * scale;
      }
      for (; i < columns; i++) {
        const double w = to_float(row[i]);
        if (!__builtin_isfinite(w)) {
          nonfinite++;
          continue;
        }
        const double difference = w - codes[i] * (double(scale) / 127);
        norm += w * w;
        if (__builtin_isfinite(difference)) error += difference * difference;
      }
      sums[3 * r] = error;
      sums[3 * r + 1] = norm;
      sums[3 * r + 2] = double(nonfinite);
    }
  });
}

}  // namespace

// x [rows, columns] of `dtype`; q and absmax are the results of quantize_int8 for x, without a threshold. sums float64 [rows, 3]:
// squared error, squared norm, non-finite elements.
QCLI_KERNEL(error_int8)
(const void* x, int dtype, int64_t rows, int64_t columns, const int8_t* q, const float* absmax, double* sums, int threads) {
  QCLI_DISPATCH(dtype, measure, x, rows, columns, q, absmax, sums, threads)
}
