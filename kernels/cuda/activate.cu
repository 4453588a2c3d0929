// The activation between two products: y = act(gate) * up, or act(gate) without up.
//
//   gate, up  DTYPE [tokens, columns], with gate_stride and up_stride elements between tokens; up may be null
//   y         DTYPE [tokens, columns]
//   KIND      SILU, GELU, GELU_TANH, RELU, RELU2 or QUICK_GELU
//
// A thread takes one value, or eight in a row if there are many (`eight`: then columns, strides and addresses must be multiples of
// eight elements). One value each spreads a single token over the multiprocessors. Bytes moved: 6 per 16-bit element.
// prebuilt: DTYPE={float,__half,__nv_bfloat16} KIND={SILU,GELU,GELU_TANH,RELU,RELU2,QUICK_GELU}
#include "functions.cuh"

using Scalar = DTYPE;
constexpr int THREADS = 256;
enum Kind { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3, RELU2 = 4, QUICK_GELU = 5 };

__device__ inline float activation(float x) {
  constexpr Kind kind = KIND;
  if (kind == SILU) return x * sigmoid(x);
  if (kind == GELU) return 0.5f * x * (1.0f + error_function(x * 0.70710678f));
  if (kind == GELU_TANH) return x * sigmoid(x * (1.59576912f + 0.0713548163f * (x * x)));  // (1 + tanh(u)) / 2 = sigmoid(2 u)
  if (kind == QUICK_GELU) return x * sigmoid(1.702f * x);
  const float positive = x < 0.0f ? 0.0f : x;  // NaN stays
  return kind == RELU ? positive : positive * positive;
}

KERNEL void __launch_bounds__(THREADS)
    activate(const Scalar* __restrict__ gate, long long gate_stride, const Scalar* __restrict__ up, long long up_stride,
             long long columns, int eight, Scalar* __restrict__ y) {
  const long long index = (long long)blockIdx.x * THREADS + threadIdx.x, column = eight ? 8 * index : index;
  if (column >= columns) return;
  const Scalar* from = gate + blockIdx.y * gate_stride + column;
  const Scalar* by = up ? up + blockIdx.y * up_stride + column : nullptr;
  Scalar* to = y + blockIdx.y * columns + column;
  if (!eight) {
    const float value = activation(to_float(*from));
    *to = from_float<Scalar>(by ? value * to_float(*by) : value);
    return;
  }
  float values[8], factors[8];
  load8(from, values);
  if (by) load8(by, factors);
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = by ? activation(values[i]) * factors[i] : activation(values[i]);
  store8(to, values);
}
