// Statistics of each channel of an activation in one pass: min, max, sum x, sum x^2, sum x^3, sum x^4, and the number of
// elements with |x| >= threshold.
//
//   x        DTYPE [rows, channels]
//   partial  float64 [slices, FIELDS, channels]
//   stats    float64 [FIELDS, channels]
//
// activation_stats: a thread reads one channel of a slice of rows, so a warp reads whole lines. Sums are float64.
// merge_stats: a thread merges one field of a channel over the slices, in their order, so the result does not depend on which
// slice was finished first. Grid: (channels / THREADS, FIELDS).
// Bytes moved: sizeof(DTYPE) per element. A channel with a NaN has NaN as minimum, maximum and sums.
// prebuilt: DTYPE={float,__half,__nv_bfloat16}
#include "common.cuh"

using Scalar = DTYPE;
constexpr int THREADS = 128;
constexpr int FIELDS = 7;
constexpr int UNROLL = 8;  // rows, and slices, loaded at once

KERNEL void __launch_bounds__(THREADS)
    activation_stats(const Scalar* __restrict__ x, long long rows, int channels, float threshold, long long slice,
                     double* __restrict__ partial) {
  const int channel = blockIdx.x * THREADS + threadIdx.x;
  if (channel >= channels) return;
  const long long begin = blockIdx.y * slice, end = min(begin + slice, rows);
  float least = INFINITY, most = -INFINITY;
  double sum = 0, squares = 0, cubes = 0, fourths = 0;
  bool any_nan = false;
  int count = 0;
  auto take = [&](float value) {
    any_nan |= value != value;
    least = fminf(least, value);
    most = fmaxf(most, value);
    const double wide = value, square = wide * wide;
    sum += wide;
    squares += square;
    cubes += square * wide;
    fourths += square * square;
    count += fabsf(value) >= threshold;
  };
  long long row = begin;
  for (; row + UNROLL <= end; row += UNROLL) {
    Scalar values[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) values[i] = x[(row + i) * channels + channel];
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) take(to_float(values[i]));
  }
  for (; row < end; ++row) take(to_float(x[row * channels + channel]));
  double* to = partial + (long long)blockIdx.y * FIELDS * channels + channel;
  const double found[FIELDS] = {any_nan ? NAN : least, any_nan ? NAN : most, sum, squares, cubes, fourths, double(count)};
#pragma unroll
  for (int i = 0; i < FIELDS; ++i) to[(long long)i * channels] = found[i];
}

KERNEL void __launch_bounds__(THREADS)
    merge_stats(const double* __restrict__ partial, int slices, int channels, double* __restrict__ stats) {
  const int channel = blockIdx.x * THREADS + threadIdx.x, field = blockIdx.y;
  if (channel >= channels) return;
  const long long step = (long long)FIELDS * channels, place = (long long)field * channels + channel;
  const double neutral = field == 0 ? INFINITY : field == 1 ? -INFINITY : 0.0;
  double found = neutral;
  for (int first = 0; first < slices; first += UNROLL) {
    double values[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) values[i] = first + i < slices ? partial[(first + i) * step + place] : neutral;
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
      // Minimum and maximum are written so that a NaN stays.
      if (field == 0) {
        found = values[i] >= found || found != found ? found : values[i];
      } else if (field == 1) {
        found = values[i] <= found || found != found ? found : values[i];
      } else {
        found += values[i];
      }
    }
  }
  stats[place] = found;
}
