// Row-wise int8 dequantization: q * (absmax * (1 / 127)) in float32, rounded once.
//
//   q       int8 [rows, columns]
//   absmax  float32 [rows]
//   out     DTYPE [rows, columns]
//
// A block takes a row at a time, a thread eight elements. Bytes moved: 1 + sizeof(DTYPE) per element.
// prebuilt: DTYPE={float,__half,__nv_bfloat16}
#include "common.cuh"

using Scalar = DTYPE;

KERNEL void __launch_bounds__(256)
    dequantize_int8(const int8_t* __restrict__ q, const float* __restrict__ absmax, long long rows, int columns,
                    Scalar* __restrict__ out) {
  const bool aligned = columns % 8 == 0;
  for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
    const float step = __fmul_rn(__ldg(absmax + row), 1.0f / 127);
    const int8_t* from = q + row * columns;
    Scalar* to = out + row * columns;
    if (aligned) {
      for (int column = threadIdx.x * 8; column < columns; column += blockDim.x * 8) {
        const uint2 words = __ldcs(reinterpret_cast<const uint2*>(from + column));
        float values[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] = __fmul_rn(float(int8_t((i < 4 ? words.x : words.y) >> 8 * (i % 4))), step);
        store8(to + column, values);
      }
    } else {
      for (int column = threadIdx.x; column < columns; column += blockDim.x) {
        to[column] = from_float<Scalar>(__fmul_rn(float(from[column]), step));
      }
    }
  }
}
