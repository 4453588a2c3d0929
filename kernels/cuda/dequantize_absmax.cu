// Decodes the absmax values that double quantization stored: map[code] * nested + offset, in float32.
//
//   codes   uint8 [count];  nested  float32 [ceil(count / 256)];  map  float32 [256]
//   absmax  float32 [count]
//
// A block takes a group of 256, so all its threads share one nested absmax. Bytes moved: 5 per value.
// prebuilt:
#include "common.cuh"

KERNEL void __launch_bounds__(256)
    dequantize_absmax(const uint8_t* __restrict__ codes, const float* __restrict__ nested, const float* __restrict__ map,
                      float offset, long long count, float* __restrict__ absmax) {
  const long long i = (long long)blockIdx.x * 256 + threadIdx.x;
  if (i < count) absmax[i] = __fadd_rn(__fmul_rn(__ldg(map + codes[i]), __ldg(nested + blockIdx.x)), offset);
}
