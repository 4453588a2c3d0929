// Double quantization (QLoRA, arXiv:2305.14314, section 3): absmax minus an offset, in 8 bits, in groups of 256.
//
//   absmax  float32 [count]
//   codes   uint8 [count]: the number of thresholds below (absmax - offset) / nested_absmax
//   nested  float32 [ceil(count / 256)]: the largest |absmax - offset| of the group
//
// A block takes a group, a thread an element. The thread finds its code among 255 ascending thresholds by bisection. A launch
// reads a 64th of the elements that the quantization of the weight reads. Rounding follows the reference bit by bit.
// prebuilt:
#include "common.cuh"

constexpr int GROUP = 256;

KERNEL void __launch_bounds__(GROUP)
    quantize_absmax(const float* __restrict__ absmax, long long count, float offset, const float* __restrict__ thresholds,
                    uint8_t* __restrict__ codes, float* __restrict__ nested) {
  __shared__ uint32_t warp_max[GROUP / 32];
  const long long i = (long long)blockIdx.x * GROUP + threadIdx.x;
  const float value = i < count ? __fsub_rn(absmax[i], offset) : 0.0f;
  const uint32_t largest_of_warp = group_max(magnitude(value), 32);
  if (threadIdx.x % 32 == 0) warp_max[threadIdx.x / 32] = largest_of_warp;
  __syncthreads();
  uint32_t largest = 0;
#pragma unroll
  for (int w = 0; w < GROUP / 32; ++w) largest = max(largest, warp_max[w]);
  const float scale = __uint_as_float(largest);
  if (threadIdx.x == 0) nested[blockIdx.x] = scale;
  if (i >= count) return;
  float scaled = __fmul_rn(value, __frcp_rn(scale));
  if (scale < 1e-38f) scaled = scale == 0.0f ? 0.0f : __fdiv_rn(value, scale);
  int code = 0;
#pragma unroll
  for (int step = 128; step > 0; step /= 2) {
    // !(<=): a NaN is above all thresholds, as in torch.bucketize.
    if (!(scaled <= __ldg(thresholds + code + step - 1))) code += step;
  }
  codes[i] = uint8_t(code);
}
