// Row-wise int8 quantization (LLM.int8(), arXiv:2208.07339, section 2): q = round(x * (127 / absmax)), half to even.
//
//   x         DTYPE [rows, columns]
//   q         int8 [rows, columns]
//   absmax    float32 [rows], of the elements whose magnitude is below the threshold
//   outliers  uint8 [columns], 1 where any element of the column is at or above the threshold; null without a threshold
//
// find_outliers marks columns; all marks are zero before. Every thread that finds an outlier writes the same 1, so atomics are not
// needed. In quantize_int8 a block takes a row: first the row's maximum, then its codes. The second reading comes from the cache.
// Outlier columns get 0. Neither kernel waits for the host. Bytes moved: 3 per 16-bit element, and 2 more to find outliers.
//
// Rounding follows the reference bit by bit: the reciprocal is rounded, then its product with 127. Rows below 1e-30, whose
// reciprocal would overflow, are scaled by 2^100 first. A row with a NaN or an infinity has that as its absmax, and q 0.
// prebuilt: DTYPE={float,__half,__nv_bfloat16}
#include "linear_int8.cuh"

constexpr int THREADS = 256;

KERNEL void __launch_bounds__(THREADS)
    find_outliers(const Scalar* __restrict__ x, long long rows, int columns, float threshold, uint8_t* __restrict__ outliers) {
  // A thread takes eight columns, and every gridDim.y-th row.
  const int column = (blockIdx.x * THREADS + threadIdx.x) * 8;
  if (column >= columns) return;
  const bool aligned = columns % 8 == 0;
  for (long long row = blockIdx.y; row < rows; row += gridDim.y) {
    const Scalar* from = x + row * columns + column;
    if (aligned) {
      float values[8];
      load8_kept(from, values);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (fabsf(values[i]) >= threshold) outliers[column + i] = 1;
      }
    } else {
      for (int i = 0; i < 8 && column + i < columns; ++i) {
        if (fabsf(to_float(from[i])) >= threshold) outliers[column + i] = 1;
      }
    }
  }
}

KERNEL void __launch_bounds__(THREADS)
    quantize_int8(const Scalar* __restrict__ x, long long rows, int columns, float threshold,
                  const uint8_t* __restrict__ outliers, int8_t* __restrict__ q, float* __restrict__ absmax) {
  __shared__ uint32_t warp_max[THREADS / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool aligned = columns % 8 == 0;
  for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
    const Scalar* from = x + row * columns;
    uint32_t largest = 0;
    auto take = [&](float value) {
      if (!(outliers && fabsf(value) >= threshold)) largest = max(largest, magnitude(value));
    };
    if (aligned) {
      for (int column = threadIdx.x * 8; column < columns; column += THREADS * 8) {
        float values[8];
        load8_kept(from + column, values);
#pragma unroll
        for (int i = 0; i < 8; ++i) take(values[i]);
      }
    } else {
      for (int column = threadIdx.x; column < columns; column += THREADS) take(to_float(from[column]));
    }
    largest = group_max(largest, 32);
    __syncthreads();  // the previous row no longer reads warp_max
    if (lane == 0) warp_max[warp] = largest;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < THREADS / 32; ++i) largest = max(largest, warp_max[i]);
    const float top = __uint_as_float(largest);
    const RowScale scale = row_scale(top);
    if (threadIdx.x == 0) absmax[row] = top;
    int8_t* to = q + row * columns;
    if (aligned) {
      for (int column = threadIdx.x * 8; column < columns; column += THREADS * 8) {
        float values[8];
        load8_kept(from + column, values);
        const uint2 none = make_uint2(0, 0);
        const uint2 marks = outliers ? __ldg(reinterpret_cast<const uint2*>(outliers + column)) : none;
        uint32_t words[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const bool outlier = (i < 4 ? marks.x : marks.y) >> 8 * (i % 4) & 1;
          words[i / 4] |= (outlier ? 0u : uint32_t(quantized(values[i], scale)) & 0xff) << 8 * (i % 4);
        }
        __stcs(reinterpret_cast<uint2*>(to + column), make_uint2(words[0], words[1]));
      }
    } else {
      for (int column = threadIdx.x; column < columns; column += THREADS) {
        to[column] = outliers && outliers[column] ? int8_t(0) : int8_t(quantized(to_float(from[column]), scale));
      }
    }
  }
}
