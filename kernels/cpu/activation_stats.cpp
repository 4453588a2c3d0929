// Statistics of each column of x in one pass: min, max, sum x, sum x^2, sum x^4, how many |x| >= threshold.
//
// A thread takes columns and goes down all rows, adding in float64: the order, and so the bits, do not depend on threads.

#include "simd.h"

namespace {

constexpr int64_t kStrip = 64;  // columns: 3 KiB of sums
constexpr int64_t kRowsAhead = 16;

template <class T>
void measure(const void* input, int64_t rows, int64_t columns, float threshold, double* stats, int threads) {
  const T* x = static_cast<const T*>(input);
  parallel(divide_up(columns, kStrip), 1, threads, [=](int64_t first, int64_t last) {
    for (int64_t strip = first; strip < last; strip++) {
      const int64_t start = strip * kStrip, width = smaller(kStrip, columns - start);
      float least[kStrip], most[kStrip];
      double sum[kStrip] = {}, square[kStrip] = {}, fourth[kStrip] = {};
      int32_t large[kStrip] = {};
      for (int64_t i = 0; i < kStrip; i++) {
        least[i] = from_bits(kInfinity);
        most[i] = -least[i];
      }
      for (int64_t r = 0; r < rows; r++) {
        const T* row = x + r * columns + start;
        const T* later = row + kRowsAhead * columns;
        for (int64_t i = 0; i < width; i += 64 / sizeof(T)) __builtin_prefetch(later + i);
        for (int64_t i = 0; i < width; i++) {
          const float value = to_float(row[i]);
          const double wide = value, squared = wide * wide;
          least[i] = value < least[i] || value != value ? value : least[i];
          most[i] = value > most[i] || value != value ? value : most[i];
          sum[i] += wide;
          square[i] += squared;
          fourth[i] += squared * squared;
          large[i] += __builtin_fabsf(value) >= threshold;
        }
      }
      for (int64_t i = 0; i < width; i++) {
        const double values[6] = {least[i], most[i], sum[i], square[i], fourth[i], double(large[i])};
        for (int64_t s = 0; s < 6; s++) stats[s * columns + start + i] = values[s];
      }
    }
  });
}

}  // namespace

// x [rows, columns] of `dtype`; stats float64 [6, columns].
QCLI_KERNEL(activation_stats)
(const void* x, int dtype, int64_t rows, int64_t columns, float threshold, double* stats, int threads) {
  QCLI_DISPATCH(dtype, measure, x, rows, columns, threshold, stats, threads)
}
