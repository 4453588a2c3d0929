// Statistics of each channel of an activation in one pass: min, max, sum x, sum x^2, sum x^4, and how many |x| >= threshold.
//
//   x        DTYPE [rows, channels]
//   partial  float64 [slices, 6, channels]
//   stats    float64 [6, channels]
//
// activation_stats: a thread follows a channel down a slice of the rows, so a warp reads whole lines; sums are float64.
// merge_stats: a thread merges a channel's slices, in their order, so that the result does not depend on who came first.
// Bytes moved: sizeof(DTYPE) per element. A channel with a NaN has NaN as minimum, maximum and sums.
// prebuilt: DTYPE={float,__half,__nv_bfloat16}
#include "common.cuh"

using Scalar = DTYPE;
constexpr int THREADS = 128;
constexpr int UNROLL = 8;  // rows under way at once

KERNEL void __launch_bounds__(THREADS)
    activation_stats(const Scalar* __restrict__ x, long long rows, int channels, float threshold, long long slice,
                     double* __restrict__ partial) {
  const int channel = blockIdx.x * THREADS + threadIdx.x;
  if (channel >= channels) return;
  const long long begin = blockIdx.y * slice, end = min(begin + slice, rows);
  float least = INFINITY, most = -INFINITY;
  double sum = 0, squares = 0, fourths = 0;
  bool any_nan = false;
  int count = 0;
  auto take = [&](float value) {
    any_nan |= value != value;
    least = fminf(least, value);
    most = fmaxf(most, value);
    const double wide = value, square = wide * wide;
    sum += wide;
    squares += square;
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
  double* to = partial + (long long)blockIdx.y * 6 * channels + channel;
  const double found[6] = {any_nan ? NAN : least, any_nan ? NAN : most, sum, squares, fourths, double(count)};
#pragma unroll
  for (int i = 0; i < 6; ++i) to[(long long)i * channels] = found[i];
}

KERNEL void __launch_bounds__(THREADS)
    merge_stats(const double* __restrict__ partial, int slices, int channels, double* __restrict__ stats) {
  const int channel = blockIdx.x * THREADS + threadIdx.x;
  if (channel >= channels) return;
  double found[6] = {INFINITY, -INFINITY, 0, 0, 0, 0};
  for (int s = 0; s < slices; ++s) {
    const double* from = partial + (long long)s * 6 * channels + channel;
    const double least = from[0], most = from[channels];
    // Written so that a NaN stays.
    found[0] = least >= found[0] || found[0] != found[0] ? found[0] : least;
    found[1] = most <= found[1] || found[1] != found[1] ? found[1] : most;
#pragma unroll
    for (int i = 2; i < 6; ++i) found[i] += from[(long long)i * channels];
  }
#pragma unroll
  for (int i = 0; i < 6; ++i) stats[(long long)i * channels + channel] = found[i];
}
