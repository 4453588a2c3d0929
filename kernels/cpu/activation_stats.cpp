// Statistics of each column of x in one pass: min, max, sum x, sum x^2, sum x^3, sum x^4, the number of |x| >= threshold.
//
// A thread takes some columns and adds all their rows in float64. The order, and so the bits, do not depend on the threads.

#include "simd.h"

namespace {

constexpr int64_t kStrip = 64;  // columns: 2.75 KiB of sums
constexpr int64_t kRowsAhead = 16;
constexpr int64_t kPanel = 4;   // rows between a load and a store of the sums

// sum + a b, for a product that is exact in float64. With or without fusing, the bits are the same.
QCLI_INLINE double plus_exact(double sum, double a, double b) {
#if defined(__FP_FAST_FMA)
  return __builtin_fma(a, b, sum);
#else
  return sum + a * b;
#endif
}

struct Sums {
  float least[kStrip], most[kStrip];
  double sum[kStrip], square[kStrip], cube[kStrip], fourth[kStrip];
  int32_t large[kStrip];
};

// Adds kRows rows of `width` columns.
template <int64_t kRows, class T>
QCLI_INLINE void add(Sums& to, const T* x, int64_t columns, int64_t width, float threshold) {
  for (int64_t i = 0; i < width; i++) {
    float least = to.least[i], most = to.most[i];
    double sum = to.sum[i], square = to.square[i], cube = to.cube[i], fourth = to.fourth[i];
    int32_t large = to.large[i];
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; r++) {
      const float value = to_float(x[r * columns + i]);
      const double wide = value, squared = wide * wide;
      least = value < least || value != value ? value : least;
      most = value > most || value != value ? value : most;
      sum += wide;
      square += squared;
      if constexpr (sizeof(T) == 2) {  // at most 11 significant bits, so 44 in a fourth power
        cube = plus_exact(cube, squared, wide);
        fourth = plus_exact(fourth, squared, squared);
      } else {
        cube += squared * wide;
        fourth += squared * squared;
      }
      large += __builtin_fabsf(value) >= threshold;
    }
    to.least[i] = least, to.most[i] = most, to.large[i] = large;
    to.sum[i] = sum, to.square[i] = square, to.cube[i] = cube, to.fourth[i] = fourth;
  }
}

template <class T>
void measure(const void* input, int64_t rows, int64_t columns, float threshold, double* stats, int threads) {
  const T* x = static_cast<const T*>(input);
  parallel(divide_up(columns, kStrip), 1, threads, [=](int64_t first, int64_t last) {
    for (int64_t strip = first; strip < last; strip++) {
      const int64_t start = strip * kStrip, width = smaller(kStrip, columns - start);
      Sums sums = {};
      for (int64_t i = 0; i < kStrip; i++) {
        sums.least[i] = from_bits(kInfinity);
        sums.most[i] = -sums.least[i];
      }
      int64_t r = 0;
      for (; r + kPanel <= rows; r += kPanel) {
        const T* panel = x + r * columns + start;
        for (int64_t k = 0; k < kPanel; k++) {
          const T* later = panel + (kRowsAhead + k) * columns;
          for (int64_t i = 0; i < width; i += 64 / sizeof(T)) __builtin_prefetch(later + i);
        }
        add<kPanel>(sums, panel, columns, width, threshold);
      }
      for (; r < rows; r++) add<1>(sums, x + r * columns + start, columns, width, threshold);
      for (int64_t i = 0; i < width; i++) {
        const double values[7] = {sums.least[i], sums.most[i], sums.sum[i], sums.square[i], sums.cube[i], sums.fourth[i],
                                  double(sums.large[i])};
        for (int64_t s = 0; s < 7; s++) stats[s * columns + start + i] = values[s];
      }
    }
  });
}

}  // namespace

// x [rows, columns] of `dtype`; stats float64 [7, columns].
QCLI_KERNEL(activation_stats)
(const void* x, int dtype, int64_t rows, int64_t columns, float threshold, double* stats, int threads) {
  QCLI_DISPATCH(dtype, measure, x, rows, columns, threshold, stats, threads)
}
