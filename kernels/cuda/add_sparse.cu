// Adds x times a sparse matrix to y: y[m, n] += sum over i in offsets[n] .. offsets[n + 1] of x[m, columns[i]] values[i].
//
//   y DTYPE [tokens, rows], x DTYPE [tokens, width], values VALUE [count], columns int32 [count], offsets int32 [rows + 1]
//
// A warp takes a row, its lanes divide the elements, and sums are float32.
// prebuilt: DTYPE={float,__half,__nv_bfloat16} VALUE={float,__half,__nv_bfloat16}
#include "common.cuh"

using Scalar = DTYPE;

KERNEL void __launch_bounds__(256)
    add_sparse(const Scalar* __restrict__ x, int tokens, const VALUE* __restrict__ values, const int* __restrict__ columns,
               const int* __restrict__ offsets, long long rows, long long width, Scalar* __restrict__ y) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (long long row = (long long)blockIdx.x * warps + threadIdx.x / 32; row < rows; row += (long long)gridDim.x * warps) {
    const int begin = __ldg(offsets + row), end = __ldg(offsets + row + 1);
    if (begin == end) continue;
    for (int m = 0; m < tokens; ++m) {
      float sum = 0.0f;
      for (int i = begin + lane; i < end; i += 32) sum = fmaf(to_float(x[m * width + __ldg(columns + i)]), to_float(values[i]), sum);
      for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(WHOLE_WARP, sum, offset);
      if (lane == 0) y[m * rows + row] = from_float<Scalar>(to_float(y[m * rows + row]) + sum);
    }
  }
}
