// Int8 weights times unquantized activations, for up to eight tokens: y[m, n] = absmax_w[n] / 127 * sum over k of x[m, k] q[n, k],
// plus bias[n]. It reads as many bytes as LLM.int8(), but has no error from quantizing x and no step for outliers.
//
//   x       DTYPE (__half, __nv_bfloat16) [tokens, columns], columns a multiple of 16
//   weight  int8 [rows, columns], scale float32 [rows], the absmax of its rows
//   bias    BIAS [rows], or null;  y DTYPE [tokens, rows]
//   FULL    1 if columns are a multiple of 256, else 0
//
// The limit is the bandwidth at which the weight is read, one byte per element. Blocks, warps and turns are those of
// linear_int8.cu. The product is in 16 bits (mma m16n8k16), so the four consecutive k of a step are two registers of two values in
// lane (g, t). An int8 becomes a 16-bit float without a conversion: its bits become the last bits of the mantissa of a number with
// a known exponent. One subtraction, for two values at once, then removes the offset.
// prebuilt: DTYPE={__half,__nv_bfloat16} FULL={0,1}
#include "int8_turns.cuh"

// Converts two of four int8 exactly: the first two, or with `half` the last two.
__device__ inline uint32_t widen(uint32_t four, int half, __half) {
  // 1024 + (q + 128), minus 1152.
  const uint32_t bits = __byte_perm(four ^ 0x80808080u, 0x64646464u, half ? 0x4342 : 0x4140);
  const uint32_t less = 0x64806480u;
  const __half2 pair = __hsub2(*reinterpret_cast<const __half2*>(&bits), *reinterpret_cast<const __half2*>(&less));
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ inline uint32_t widen(uint32_t four, int half, __nv_bfloat16) {
  // A mantissa has room for seven bits: 128 + (q mod 128), minus 128 or, for negative q, minus 256.
  const uint32_t apart = __byte_perm(four, 0, half ? 0x4342 : 0x4140);
  const uint32_t bits = (apart & 0x007f007fu) | 0x43004300u, less = (apart & 0x00800080u) | 0x43004300u;
  const __nv_bfloat162 pair =
      __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&bits), *reinterpret_cast<const __nv_bfloat162*>(&less));
  return *reinterpret_cast<const uint32_t*>(&pair);
}

KERNEL void __launch_bounds__(THREADS, 2)
    linear_w8a16(const Scalar* __restrict__ x, int tokens, const int8_t* __restrict__ weight, const float* __restrict__ scale,
                 const Bias* __restrict__ bias, long long rows, int columns, Scalar* __restrict__ y) {
  __shared__ float sums[2][WARPS][SUMS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int chunks = (columns + CHUNK - 1) / CHUNK, turns = (chunks + TURN - 1) / TURN;
  const long long tiles = (rows + TILE - 1) / TILE;
  const Scalar* token = x + (long long)g * columns + 16 * t;

  Turns weights = {weight, rows, columns, g, t};
  weights.go_to(blockIdx.x);
  if (warp < turns) weights.load(warp);

  int parity = 0;
  for (long long tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float total[4] = {0, 0, 0, 0};
    for (int turn = warp; turn < turns; turn += WARPS) {
      uint4 words[TURN][2];
      weights.take(words, turn, turns, warp, tile + gridDim.x);
#pragma unroll
      for (int c = 0; c < TURN; ++c) {
        const int column = (turn * TURN + c) * CHUNK;
        uint32_t b[8] = {};
        if (g < tokens && weights.inside(column)) {
          const uint4* values = reinterpret_cast<const uint4*>(token + column);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint4 bits = __ldg(values + i);
            b[4 * i] = bits.x;
            b[4 * i + 1] = bits.y;
            b[4 * i + 2] = bits.z;
            b[4 * i + 3] = bits.w;
          }
        }
        const uint32_t of_row[2][4] = {{words[c][0].x, words[c][0].y, words[c][0].z, words[c][0].w},
                                       {words[c][1].x, words[c][1].y, words[c][1].z, words[c][1].w}};
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          const uint32_t a[4] = {widen(of_row[0][s], 0, Scalar()), widen(of_row[1][s], 0, Scalar()),
                                 widen(of_row[0][s], 1, Scalar()), widen(of_row[1][s], 1, Scalar())};
          mma_16x8x16(total, a, b[2 * s], b[2 * s + 1], Scalar());
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[parity][warp][(2 * t + i % 2) * PITCH + g + 8 * (i / 2)] = total[i];
    __syncthreads();
    if (threadIdx.x < MOST * TILE) {
      const int m = threadIdx.x / TILE;
      const long long row = tile * TILE + threadIdx.x % TILE;
      if (m < tokens && row < rows) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) sum += sums[parity][i][m * PITCH + threadIdx.x % TILE];
        sum = __fmul_rn(sum, __fmul_rn(__ldg(scale + row), 1.0f / 127));
        if (bias) sum += to_float(bias[row]);
        y[m * rows + row] = from_float<Scalar>(sum);
      }
    }
    parity ^= 1;  // the next tile's sums then need not wait until these are read
  }
}
