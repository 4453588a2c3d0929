// Shared by the kernels of LLM.int8() (arXiv:2208.07339, equation 8):
//
//   y = int32(q_x q_w^T) * absmax_x * absmax_w / 127^2  +  x[:, outliers] W[:, outliers]^T  +  x[:, fixed] original^T  +  bias
//
//   x         DTYPE [tokens, columns]
//   weight    int8 [rows, columns], scale float32 [rows], the absmax of its rows
//   bias      BIAS [rows], or null; BIAS is one of the types that DTYPE may be
//   fixed     int32 [fixed_count], columns that are never rounded, and no outliers; null without any
//   original  DTYPE [rows, fixed_count], those columns of the unquantized weight; null without any
//   y         DTYPE [tokens, rows]
//
// W's outlier columns are its int8 columns, dequantized to DTYPE. Integer products are exact, all other sums are float32.
#pragma once

#include "common.cuh"

#ifndef BIAS
#define BIAS DTYPE
#endif

using Scalar = DTYPE;
using Bias = BIAS;

// An element of W in the outlier part.
__device__ inline Scalar dequantized(int8_t q, float scale) {
  return from_float<Scalar>(__fmul_rn(float(q), __fmul_rn(scale, 1.0f / 127)));
}

// The integer part of y.
__device__ inline float ordinary(int product, float x_absmax, float scale) {
  return __fmul_rn(__fmul_rn(float(product), __fmul_rn(x_absmax, 1.0f / (127 * 127))), scale);
}

struct RowScale {
  float boost, scale;
};

// The factors of a row in q = round(x * boost * scale). Together they are 127 / absmax, which alone might overflow.
__device__ inline RowScale row_scale(float absmax) {
  const float boost = absmax < 1e-30f ? 1.2676506002282294e30f : 1.0f;
  return {boost, absmax > 0.0f ? __fmul_rn(__frcp_rn(__fmul_rn(absmax, boost)), 127.0f) : 0.0f};
}

__device__ inline int quantized(float value, const RowScale& s) {
  return __float2int_rn(__fmul_rn(__fmul_rn(value, s.boost), s.scale));  // a NaN gives 0
}
