// 8-bit weights times unquantized activations, for up to eight tokens:
//
//   y[m, n] = unit * sum over k of x[m, k] (q[n, k] - zero) scale, plus bias[n]
//
// It reads as many bytes as LLM.int8(), but has no error from quantizing x and no step for outliers.
//
//   x       DTYPE (__half, __nv_bfloat16) [tokens, columns], columns a multiple of 16
//   weight  int8 [rows, columns], or the bits of E4M3 if E4M3 is 1
//   scale   float32 [rows], or [rows, groups] if GROUP is not 0: groups of GROUP chunks of 64 columns, the last one may be partial
//   unit    1 / 127 if scale is the absmax of rows, else 1; and 256 times as much with E4M3
//   zero    int8, as many as scales, if ZERO is 1; else not read
//   bias    BIAS [rows], or null;  y DTYPE [tokens, rows]
//   FULL    1 if columns are a multiple of 256, else 0
//
// The limit is the bandwidth at which the weight is read, one byte per element. Blocks, warps and turns are those of
// linear_int8.cu. The product is in 16 bits (mma m16n8k16), so the four consecutive k of a step are two registers of two values in
// lane (g, t). An int8 becomes a 16-bit float without a conversion: its bits become the last bits of the mantissa of a number with
// a known exponent. One subtraction, for two values at once, then removes the offset, and another one a zero point: integers up to
// 256 are exact in 16 bits. The bits of an E4M3 are moved to where a 16-bit float has its exponent. A scale multiplies the sum over
// a row or, for groups, over a chunk.
// prebuilt: DTYPE={__half,__nv_bfloat16} FULL={0,1}
// prebuilt: DTYPE={__half,__nv_bfloat16} FULL={0,1} E4M3={1} GROUP={,2}
// prebuilt: DTYPE={__half,__nv_bfloat16} FULL={0,1} GROUP={1,2} ZERO={,1}
#include "int8_turns.cuh"

#ifndef E4M3
#define E4M3 0
#endif
#ifndef GROUP
#define GROUP 0
#endif
constexpr int CHUNKS = GROUP ? GROUP : 1;  // that share a scale

#if E4M3
// Converts two of four E4M3 exactly, except for NaN, which no quantizer stores: the first two, or with `half` the last two. The
// results are 1/256 of the values, because both exponents begin at zero, and their biases are 7 and 15.
__device__ inline uint32_t widen(uint32_t four, int half, __half) {
  const uint32_t apart = __byte_perm(four, 0, half ? 0x3424 : 0x1404);  // each in the upper half of 16 bits
  return (apart & 0x80008000u) | (apart & 0x7f007f00u) >> 1;
}
__device__ inline uint32_t widen(uint32_t four, int half, __nv_bfloat16) {
  const uint32_t apart = __byte_perm(four, 0, half ? 0x3424 : 0x1404);
  // The bias is 127 here, so a product with 2^112 follows.
  return multiply2((apart & 0x80008000u) | (apart & 0x7f007f00u) >> 4, 0x77807780u, __nv_bfloat16());
}
#else

// Converts two of four int8 exactly: the first two, or with `half` the last two.
__device__ inline uint32_t widen(uint32_t four, int half, __half) {
  // 1024 + (q + 128), minus 1152.
  const uint32_t bits = __byte_perm(four ^ 0x80808080u, 0x64646464u, half ? 0x4342 : 0x4140);
  return subtract2(bits, 0x64806480u, __half());
}
__device__ inline uint32_t widen(uint32_t four, int half, __nv_bfloat16) {
  // A mantissa has room for seven bits: 128 + (q mod 128), minus 128 or, for negative q, minus 256.
  const uint32_t apart = __byte_perm(four, 0, half ? 0x4342 : 0x4140);
  const uint32_t bits = (apart & 0x007f007fu) | 0x43004300u, less = (apart & 0x00800080u) | 0x43004300u;
  return subtract2(bits, less, __nv_bfloat16());
}
#endif

// What belongs to the groups of a lane's rows. It is loaded one turn ahead, as the weight.
struct Group {
  float scale;
#if ZERO
  int8_t zero;
#endif
};
struct Groups {
  const float* scale;
  const int8_t* zero;
  long long rows;
  int count, g;  // groups of a row
  long long first[2];
  Group next[TURN][2];

  __device__ inline void go_to(long long tile) {
#pragma unroll
    for (int r = 0; r < 2; ++r) first[r] = min(tile * TILE + g + 8 * r, rows - 1) * count;
  }

  __device__ inline void load(int turn) {
#pragma unroll
    for (int c = 0; c < TURN; ++c) {
      const int group = min((turn * TURN + c) / CHUNKS, count - 1);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        next[c][r].scale = __ldg(scale + first[r] + group);
#if ZERO
        next[c][r].zero = __ldg(zero + first[r] + group);
#endif
      }
    }
  }

  // As Turns::take.
  __device__ inline void take(Group (&groups)[TURN][2], int turn, int turns, int begin, long long next_tile) {
#pragma unroll
    for (int c = 0; c < TURN; ++c) {
      groups[c][0] = next[c][0];
      groups[c][1] = next[c][1];
    }
    const bool last = turn + WARPS >= turns;
    if (last) go_to(next_tile);
    load(last ? begin : turn + WARPS);
  }
};

// Two values of W, but for their scale.
__device__ inline uint32_t values_of(uint32_t four, int half, const Group& group) {
  const uint32_t values = widen(four, half, Scalar());
#if ZERO
  return subtract2(values, pack2<Scalar>(group.zero, group.zero), Scalar());
#else
  return values;
#endif
}

KERNEL void __launch_bounds__(THREADS, 2)
    linear_w8a16(const Scalar* __restrict__ x, int tokens, const int8_t* __restrict__ weight, const float* __restrict__ scale,
                 const int8_t* __restrict__ zero, float unit, const Bias* __restrict__ bias, long long rows, int columns,
                 Scalar* __restrict__ y) {
  __shared__ float sums[2][WARPS][SUMS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int chunks = (columns + CHUNK - 1) / CHUNK, turns = (chunks + TURN - 1) / TURN;
  const long long tiles = (rows + TILE - 1) / TILE;
  const Scalar* token = x + (long long)g * columns + 16 * t;

  Turns weights = {weight, rows, columns, g, t};
  weights.go_to(blockIdx.x);
  if (warp < turns) weights.load(warp);
  Groups groups = {scale, zero, rows, (chunks + CHUNKS - 1) / CHUNKS, g};
  if constexpr (GROUP) {
    groups.go_to(blockIdx.x);
    if (warp < turns) groups.load(warp);
  }

  int parity = 0;
  for (long long tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float total[4] = {0, 0, 0, 0};
    for (int turn = warp; turn < turns; turn += WARPS) {
      uint4 words[TURN][2];
      weights.take(words, turn, turns, warp, tile + gridDim.x);
      Group group[TURN][2];
      if constexpr (GROUP) groups.take(group, turn, turns, warp, tile + gridDim.x);
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
        float sum[4] = {0, 0, 0, 0};  // over a group's chunk
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          const uint32_t a[4] = {values_of(of_row[0][s], 0, group[c][0]), values_of(of_row[1][s], 0, group[c][1]),
                                 values_of(of_row[0][s], 1, group[c][0]), values_of(of_row[1][s], 1, group[c][1])};
          mma_16x8x16(GROUP ? sum : total, a, b[2 * s], b[2 * s + 1], Scalar());
        }
        if constexpr (GROUP) {
#pragma unroll
          for (int i = 0; i < 4; ++i) total[i] = fmaf(group[c][i / 2].scale, sum[i], total[i]);
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
        sum = __fmul_rn(sum, GROUP ? unit : __fmul_rn(__ldg(scale + row), unit));
        if (bias) sum += to_float(bias[row]);
        y[m * rows + row] = from_float<Scalar>(sum);
      }
    }
    parity ^= 1;  // the next tile's sums then need not wait until these are read
  }
}
