// RMS norm or layer norm of a sum, for a few tokens.
//
//   sum = factor x + residual
//   y   = sum / sqrt(mean(sum^2) + eps) * weight + bias                        RMS
//   y   = (sum - mean(sum)) / sqrt(var(sum) + eps) * weight + bias             centered
//
//   x               DTYPE [tokens, rows, n], with x_stride elements between tokens
//   residual, sum   [tokens, rows, n] of the dtype residual_type; residual may be null; the sum may be the residual
//   weight, bias    [n] of the dtypes weight_type and bias_type, or null
//   y               DTYPE [tokens, rows, n]; may be x if that is contiguous
//   WARPS           1 for short rows, such as a head, or 8
//
// A block takes a row, and each thread every WARPS * 32-th of its values. It reads them once for each of its two sums (three, if
// centered): again from the caches, which costs less than registers for rows of any length. A warp reads whole lines. Sums are
// float32. Bytes moved: 2 per 16-bit element and tensor. The kernel is norm_rows, because CUDA has a function norm.
// prebuilt: DTYPE={float,__half,__nv_bfloat16} WARPS={1,8}
#include "functions.cuh"

using Scalar = DTYPE;
constexpr int THREADS = 32 * WARPS;

// The sum over the block. All threads get it.
__device__ inline float block_sum(float value, float* of_warps) {
  value = group_sum(value, 32);
  if (WARPS == 1) return value;
  __syncthreads();  // the previous sum is no longer read
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0.0f;
#pragma unroll
  for (int i = 0; i < WARPS; ++i) value += of_warps[i];
  return value;
}

KERNEL void __launch_bounds__(THREADS)
    norm_rows(const Scalar* x, long long x_stride, int rows, int n, const void* residual, int residual_type, float factor,
              const void* __restrict__ weight, int weight_type, const void* __restrict__ bias, int bias_type, float eps,
              int centered, Scalar* y, void* sum) {
  __shared__ float of_warps[WARPS];
  const long long first = (long long)blockIdx.x * n;  // of residual, y and sum
  const Scalar* from = x + blockIdx.x / rows * x_stride + (long long)(blockIdx.x % rows) * n;
  auto total = [&](int i) {
    const float value = __fmul_rn(to_float(from[i]), factor);
    return residual ? __fadd_rn(load_as(residual, residual_type, first + i), value) : value;
  };
  float mean = 0.0f, squares = 0.0f;
  if (centered) {
#pragma unroll 4
    for (int i = threadIdx.x; i < n; i += THREADS) mean += total(i);
    mean = __fdiv_rn(block_sum(mean, of_warps), float(n));
  }
#pragma unroll 4
  for (int i = threadIdx.x; i < n; i += THREADS) {
    const float value = total(i) - mean;
    squares += value * value;
  }
  const float scale = __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(block_sum(squares, of_warps), float(n)) + eps));
#pragma unroll 2
  for (int i = threadIdx.x; i < n; i += THREADS) {
    const float value = total(i);
    float result = (value - mean) * scale;
    if (weight) result *= load_as(weight, weight_type, i);
    if (bias) result += load_as(bias, bias_type, i);
    store_as(sum, residual_type, first + i, value);
    y[first + i] = from_float<Scalar>(result);
  }
}
