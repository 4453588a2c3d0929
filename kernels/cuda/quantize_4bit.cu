// Blockwise 4-bit quantization (QLoRA, arXiv:2305.14314, section 2): absmax per block, the nearest code of x / absmax.
//
//   x       DTYPE [count]
//   packed  uint8 [ceil(count / 2)]: two codes per byte, the earlier element in the high nibble
//   absmax  float32 [ceil(count / block_size)]
//
// A warp takes 256 elements at once, eight per lane: one or two 16-byte loads, the maximum over the lanes of a block by
// shuffles, one 4-byte store. For other block sizes, and for the end of the tensor with its partial block, a warp takes one block
// and reads it twice. Bytes moved: count * (sizeof(DTYPE) + 0.5) + 4 * count / block_size.
//
// One comparison finds the code of v = x / absmax. [-1, 1] is divided into 32 cells of 1/16. For both codebooks every cell has at
// most one of the 15 thresholds. Each lane keeps one cell's threshold and the codes on its two sides; two shuffles look them up.
// Rounding follows the reference bit by bit: the products are never fused.
// prebuilt: DTYPE={float,__half,__nv_bfloat16} BLOCK_SIZE={64,}
#include "common.cuh"

struct SearchTable {
  float threshold[32];  // infinity for a cell without one
  uint32_t codes[32];   // the code up to the threshold, and 16 times the code above it
};

using Scalar = DTYPE;
constexpr float SMALLEST_RECIPROCAL = 1e-38f;
constexpr int SPAN = 256;

// Every lane of the warp must call this. A NaN gets the first code, because all comparisons with it fail.
__device__ inline uint32_t code_of(float v, float threshold, uint32_t codes) {
  const float inside = fminf(fmaxf(v, -1.0f), 0.99999994f);  // rounding may move v beyond 1
  // Added to 2^23, floor(16 v) + 16 is in the last bits of the sum. A shuffle reads only those.
  const uint32_t cell = __float_as_uint(__fmaf_rd(inside, 16.0f, 8388624.0f));
  const float limit = __shfl_sync(WHOLE_WARP, threshold, cell);
  const uint32_t both = __shfl_sync(WHOLE_WARP, codes, cell);
  return v > limit ? both >> 4 : both & 15;
}

// Whether the block's reciprocal may overflow.
__device__ inline bool is_tiny(float absmax) { return absmax < SMALLEST_RECIPROCAL && absmax > 0.0f; }
__device__ inline float reciprocal_of(float absmax) {
  return __frcp_rn(absmax < SMALLEST_RECIPROCAL ? SMALLEST_RECIPROCAL : absmax);
}

// One block by one warp, for any length. Not inlined because a division takes many instructions.
__device__ __noinline__ void quantize_block(const Scalar* x, long long start, int length, bool whole, float threshold,
                                            uint32_t codes, uint32_t zero_code, uint8_t* packed, float* absmax) {
  const int lane = threadIdx.x % 32;
  uint32_t largest = 0;
  for (int i = lane; i < length; i += 32) largest = max(largest, magnitude(to_float(x[start + i])));
  const float scale = __uint_as_float(group_max(largest, 32));
  const float reciprocal = reciprocal_of(scale);
  // The last, partial block is divided, as in bitsandbytes' CPU path.
  const bool quotient = whole ? is_tiny(scale) : scale != 0.0f;
#pragma unroll 1
  for (int base = 0; base < length; base += 64) {
    uint32_t pair[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int i = base + 2 * lane + j;
      const float value = i < length ? to_float(x[start + i]) : 0.0f;
      const float v = quotient ? __fdiv_rn(value, scale) : whole ? __fmul_rn(value, reciprocal) : value;
      const uint32_t code = code_of(v, threshold, codes);
      pair[j] = i < length ? code : zero_code;
    }
    if (base + 2 * lane < length) packed[(start + base) / 2 + lane] = uint8_t(pair[0] << 4 | pair[1]);
  }
  if (lane == 0) *absmax = scale;
}

// 256 elements, in blocks of 8 * `lanes`.
__device__ inline void quantize_span(const Scalar* x, long long start, int lanes, float threshold, uint32_t codes,
                                     uint32_t zero_code, uint8_t* packed, float* absmax) {
  const int lane = threadIdx.x % 32;
  float values[8];
  load8(x + start + lane * 8, values);
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) largest = max(largest, magnitude(values[i]));
  const float scale = __uint_as_float(group_max(largest, lanes));
  if (__ballot_sync(WHOLE_WARP, is_tiny(scale))) {  // rare
    for (int i = 0; i < SPAN; i += lanes * 8) {
      quantize_block(x, start + i, lanes * 8, true, threshold, codes, zero_code, packed, absmax + (start + i) / (lanes * 8));
    }
    return;
  }
  const float reciprocal = reciprocal_of(scale);
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    word |= code_of(__fmul_rn(values[i], reciprocal), threshold, codes) << (8 * (i / 2) + (i % 2 ? 0 : 4));
  }
  reinterpret_cast<uint32_t*>(packed + start / 2)[lane] = word;
  if (lane % lanes == 0) absmax[start / (lanes * 8) + lane / lanes] = scale;
}

KERNEL void __launch_bounds__(256)
    quantize_4bit(const Scalar* __restrict__ x, long long count, int block_size, const __grid_constant__ SearchTable table,
                  int zero_code, uint8_t* __restrict__ packed, float* __restrict__ absmax) {
  const int size = BLOCK_SIZE ? BLOCK_SIZE : block_size;
  const int lane = threadIdx.x % 32;
  const long long warp = (long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  const long long warps = (long long)gridDim.x * (blockDim.x / 32);
  const float threshold = table.threshold[lane];
  const uint32_t codes = table.codes[lane];
  long long begin = 0;  // the first block that is done by quantize_block
  if (size >= 16 && size <= SPAN && (size & (size - 1)) == 0) {
    const long long spans = count / SPAN;
    for (long long span = warp; span < spans; span += warps) {
      quantize_span(x, span * SPAN, size / 8, threshold, codes, zero_code, packed, absmax);
    }
    begin = spans * (SPAN / size);
  }
  const long long blocks = (count + size - 1) / size;
  for (long long block = begin + warp; block < blocks; block += warps) {
    const long long start = block * size;
    const bool whole = count - start >= size;
    quantize_block(x, start, whole ? size : int(count - start), whole, threshold, codes, zero_code, packed, absmax + block);
  }
}
