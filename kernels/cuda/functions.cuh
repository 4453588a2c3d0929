// Shared by the kernels of a decoding step: exp and erf by polynomials, so that all GPUs give the same, and values whose dtype is
// an argument. The polynomials are those of kernels/cpu/functions.h.
#pragma once

#include "common.cuh"

// The dtype of a tensor that is small beside the rest, as an argument instead of a constant.
enum Dtype : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

__device__ inline float load_as(const void* from, int dtype, long long i) {
  if (dtype == FLOAT32) return static_cast<const float*>(from)[i];
  if (dtype == BFLOAT16) return to_float(static_cast<const __nv_bfloat16*>(from)[i]);
  return to_float(static_cast<const __half*>(from)[i]);
}
__device__ inline void store_as(void* to, int dtype, long long i, float value) {
  if (dtype == FLOAT32) {
    static_cast<float*>(to)[i] = value;
  } else if (dtype == BFLOAT16) {
    static_cast<__nv_bfloat16*>(to)[i] = from_float<__nv_bfloat16>(value);
  } else {
    static_cast<__half*>(to)[i] = from_float<__half>(value);
  }
}

// exp(x) for x <= 0. Below -87.7 it is 0. NaN stays NaN.
__device__ inline float exp_negative(float x) {
  const float limited = x < -88.0f ? -88.0f : x;
  const float shifted = __fadd_rn(__fmul_rn(limited, 1.44269504f), 12582912.0f), n = __fsub_rn(shifted, 12582912.0f);
  const float r = limited - n * 0.693359375f - n * -2.12194440e-4f;
  float sum = 1.9875691500e-4f;
  sum = sum * r + 1.3981999507e-3f;
  sum = sum * r + 8.3334519073e-3f;
  sum = sum * r + 4.1665795894e-2f;
  sum = sum * r + 1.6666665459e-1f;
  sum = sum * r + 5.0000001201e-1f;
  const float power = sum * (r * r) + r + 1.0f;
  return power * __uint_as_float((__float_as_uint(shifted) << 23) + 0x3f800000u);  // at n = -127 the factor is 0
}

// 1 / (1 + exp(-x)).
__device__ inline float sigmoid(float x) {
  const float power = exp_negative(-fabsf(x));
  return __fdiv_rn(x < 0.0f ? power : 1.0f, 1.0f + power);
}

__device__ inline float hyperbolic_tangent(float x) {
  const float magnitude = fabsf(x), power = exp_negative(-2.0f * magnitude), far = __fdiv_rn(1.0f - power, 1.0f + power);
  const float square = x * x;
  float sum = -5.70498872745e-3f;
  sum = sum * square + 2.06390887954e-2f;
  sum = sum * square - 5.37397155531e-2f;
  sum = sum * square + 1.33314422036e-1f;
  sum = sum * square - 3.33332819422e-1f;
  return magnitude < 0.625f ? sum * square * x + x : x < 0.0f ? -far : far;
}

__device__ inline float error_function(float x) {
  const float limited = x > 4.0f ? 4.0f : x < -4.0f ? -4.0f : x, square = limited * limited;
  float above = -2.72614225801306e-10f;
  above = above * square + 2.77068142495902e-08f;
  above = above * square - 2.10102402082508e-06f;
  above = above * square - 5.69250639462346e-05f;
  above = above * square - 7.34990630326855e-04f;
  above = above * square - 2.95459980854025e-03f;
  above = above * square - 1.60960333262415e-02f;
  float below = -1.45660718464996e-05f;
  below = below * square - 2.13374055278905e-04f;
  below = below * square - 1.68282697438203e-03f;
  below = below * square - 7.37332916720468e-03f;
  below = below * square - 1.42647390514189e-02f;
  return __fdiv_rn(limited * above, below);
}

// The sum over each aligned group of `lanes` lanes, a power of two. All of them get it.
__device__ inline float group_sum(float value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(WHOLE_WARP, value, offset);
  return value;
}
