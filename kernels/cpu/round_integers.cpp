// Integers in groups of a row: scales, zero points, codes and what they cost. The rules are in qcli/ops/round_integers.py.
//
// A group is read twice, the second time from L1. Groups with a value that is not finite, or with an extreme scale, take the same
// way with checks.

#include "rounding.h"

namespace {

struct Form {
  float least, most;  // of the codes
  bool zero_point;
  bool given;  // scales and zero points
  float eps;
};

template <class T, bool kChecked>
QCLI_INLINE void encode(const T* x, int64_t count, float scale, float zero, const Form& form, int8_t* codes, Sums* total) {
  const F32x16 divisor = all(scale), least = all(form.least - zero), most = all(form.most - zero), shift = all(zero);
  const F32x16 magic = all(12582912.0f);  // a sum with it rounds to an integer, ties to even
  Sums sums = *total;
  for (int64_t i = 0; i < count; i += 16) {
    const F32x16 w = load_some(x + i, count - i), v = w / divisor;
    F32x16 n = minimum(maximum(v, least), most) + magic - magic;  // the code without the zero point
    if (kChecked) n = where_number(v, n, all(0.0f) - shift);
    store_some_bytes(codes + i, rounded(n + shift), count - i);
    note<kChecked>(w, through(x, n * divisor), &sums);
  }
  *total = sums;
}

QCLI_INLINE float zero_of(float low, float scale, const Form& form) {
  const float zero = nearbyintf(form.least - low / scale);
  return zero != zero ? 0.0f : zero < form.least ? form.least : zero > form.most ? form.most : zero;
}

template <class T>
QCLI_INLINE void find_scale(const T* x, int64_t count, float largest, const Form& form, float* scale, float* zero) {
  const float range = form.most - form.least;
  float low = 0, found = largest / (range / 2);
  if (form.zero_point && largest == largest) {
    F32x16 lows = all(0.0f), highs = lows;
    for (int64_t i = 0; i < count; i += 16) {
      const F32x16 w = load_some(x + i, count - i);
      lows = minimum(w, lows);
      highs = maximum(w, highs);
    }
    low = -max_lanes(all(0.0f) - lows);
    found = (max_lanes(highs) - low) / range;
  }
  found = through<T>(found);
  *scale = found == 0 ? form.eps : found;
  *zero = form.zero_point ? zero_of(low, *scale, form) : 0.0f;
}

template <class T>
void run(const void* input, int64_t rows, int64_t columns, int64_t size, const Form& form, int8_t* codes, void* scales,
         int8_t* zero_points, double* partial, int threads) {
  const T* x = static_cast<const T*>(input);
  T* scale_of = static_cast<T*>(scales);
  const int64_t groups = columns / size;
  parallel(rows, divide_up(kGrain, larger<int64_t>(columns, 1)), threads, [=, &form](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      Sums sums = no_sums();
      for (int64_t g = row * groups; g < (row + 1) * groups; g++) {
        const T* group = x + g * size;
        const float largest = absmax_of(group, size);
        float scale, zero;
        if (form.given) {
          scale = to_float(scale_of[g]);
          zero = form.zero_point ? float(zero_points[g]) : 0.0f;
        } else {
          find_scale(group, size, largest, form, &scale, &zero);
          from_float(scale, &scale_of[g]);
          if (form.zero_point) zero_points[g] = int8_t(zero);
        }
        const float magnitude = __builtin_fabsf(scale);
        if (largest < from_bits(kInfinity) && magnitude > 0 && magnitude <= most_scale(x)) {
          encode<T, false>(group, size, scale, zero, form, codes + g * size, &sums);
        } else {
          encode<T, true>(group, size, scale, zero, form, codes + g * size, &sums);
        }
      }
      write_sums(sums, partial + 3 * row);
    }
  });
}

}  // namespace

// x [rows, columns] of `dtype`, in groups of `size`, which divides columns; codes int8 [rows, columns] from least to most. scales of
// `dtype` and, with zero points, zero_points int8 [rows, columns / size]: written, or read if they are `given`. partial float64
// [rows, 3]: squared error, squared norm and non-finite elements.
QCLI_KERNEL(round_integers)
(const void* x, int dtype, int64_t rows, int64_t columns, int64_t size, int least, int most, int zero_point, int given, float eps,
 int8_t* codes, void* scales, int8_t* zero_points, double* partial, int threads) {
  const Form form = {float(least), float(most), zero_point != 0, given != 0, eps};
  QCLI_DISPATCH(dtype, run, x, rows, columns, size, form, codes, scales, zero_points, partial, threads)
}
