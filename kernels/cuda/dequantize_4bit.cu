// Blockwise 4-bit dequantization: the code's value, less zero / 8, times the block's absmax in float32, rounded once.
//
//   packed  uint8 [ceil(count / 2)]: two codes per byte, the earlier element in the high nibble
//   absmax  float32 [ceil(count / block_size)]
//   zero    int8, as many, if ZERO is 1; else not read
//   out     DTYPE [count]
//
// A lane turns four bytes into eight elements. Neighbouring lanes take neighbouring words, so a warp loads and stores whole lines.
// UNROLL words are loaded at once. Lanes 16 to 31 repeat the codebook; a shuffle takes its lane number modulo 32, so it looks a
// code up without a mask. Bytes moved: count * (sizeof(DTYPE) + 0.5) + (4 + ZERO) * count / block_size.
// prebuilt: DTYPE={float,__half,__nv_bfloat16} BLOCK_SIZE={64,}
// prebuilt: DTYPE={float,__half,__nv_bfloat16} BLOCK_SIZE={128,} ZERO={1}
#include "common.cuh"

using Scalar = DTYPE;
constexpr int UNROLL = 4;

// A value of the block.
__device__ inline float scaled(float value, const float* absmax, const int8_t* zero, long long block) {
  if constexpr (ZERO) value = __fsub_rn(value, float(__ldg(zero + block)) * 0.125f);
  return __fmul_rn(value, __ldg(absmax + block));
}

KERNEL void __launch_bounds__(256)
    dequantize_4bit(const uint8_t* __restrict__ packed, const float* __restrict__ absmax, long long count, int block_size,
                    const __grid_constant__ Codebook codebook, const int8_t* __restrict__ zero, Scalar* __restrict__ out) {
  const int size = BLOCK_SIZE ? BLOCK_SIZE : block_size;
  const float mine = codebook.value[threadIdx.x % 16];
  const long long words = count / 8;
  const long long step = blockDim.x;
  for (long long first = (long long)blockIdx.x * step * UNROLL; first < words; first += gridDim.x * step * UNROLL) {
    uint32_t word[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const long long w = first + u * step + threadIdx.x;
      word[u] = w < words ? __ldcs(reinterpret_cast<const uint32_t*>(packed) + w) : 0;
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const long long w = first + u * step + threadIdx.x;
      float values[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        values[i] = __shfl_sync(WHOLE_WARP, mine, word[u] >> (8 * (i / 2) + (i % 2 ? 0 : 4)));
      }
      if (w < words) {
        if (size % 8 == 0) {
          const long long block = w * 8 / size;
#pragma unroll
          for (int i = 0; i < 8; ++i) values[i] = scaled(values[i], absmax, zero, block);
        } else {  // sizes are even: a byte has one absmax
#pragma unroll
          for (int i = 0; i < 8; ++i) values[i] = scaled(values[i], absmax, zero, (w * 8 + i) / size);
        }
        store8(out + w * 8, values);
      }
    }
  }
  if (blockIdx.x == 0 && threadIdx.x < 32) {  // the last elements, fewer than eight
    const long long i = words * 8 + threadIdx.x;
    const uint32_t code = i < count ? packed[i / 2] >> (i % 2 ? 0 : 4) : 0;
    const float value = __shfl_sync(WHOLE_WARP, mine, code);
    if (i < count) out[i] = from_float<Scalar>(scaled(value, absmax, zero, i / size));
  }
}
