// Weights of 2, 3 or 4 bits whose codes name entries of a table, times activations, for up to eight tokens:
//
//   y[m, n] = sum over k of x[m, k] (table[code[n, k]] - zero[n, g]) absmax[n, g]  +  bias[n]
//
//   x       DTYPE (__half, __nv_bfloat16) [tokens, columns], columns a multiple of 64
//   packed  uint8 [rows, columns / 64 units of 8 BITS bytes], as pack_planes in qcli/packing.py lays them out
//   table   float32 [2^BITS], or [rows, 2^BITS] if OWN is 1
//   absmax  float32 [rows, groups], or null: groups of GROUP units, or whole rows if GROUP is 0
//   zero    float32 likewise, if ZERO is 1; else not read
//   bias    DTYPE [rows], or null;  y DTYPE [tokens, rows]
//
// The limit is the bandwidth at which the weight is read. A block takes TILE rows at a time, and its warps divide the units. A warp
// takes TURN units per turn, loaded one turn ahead over all tiles of the block. Lane (g, t) takes 16 columns of a unit in rows g and
// g + 8, four for each step of an mma; which ones is the same for x. Its rows' tables are in registers, as 16-bit values in units of
// the largest magnitude. Byte permutations look them up: one for two values of a table of four entries. Larger tables are kept as low
// bytes and high bytes, and a nibble of a word names the byte. What a zero point takes needs the sums of x over units: products with
// ones.
// prebuilt: DTYPE={__half,__nv_bfloat16} BITS={2,3,4} OWN={0} GROUP={0,1,2} ZERO={,1}
// prebuilt: DTYPE={__half,__nv_bfloat16} BITS={2,3,4} OWN={1} GROUP={0}
#include "common.cuh"

using Scalar = DTYPE;

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * 32;
constexpr int TILE = 16;  // rows of an mma
constexpr int UNIT = 64;  // columns
constexpr int TURN = BITS == 4 ? 2 : 4;  // units; as many as registers allow
constexpr int MOST = 8;   // the tokens of an mma
constexpr int PITCH = TILE + 4;     // values per token's sums; the padding spreads a warp's sums over all banks
constexpr int SUMS = MOST * PITCH;  // per warp
constexpr int ENTRIES = 1 << BITS;
constexpr int UNIT_BYTES = 8 * BITS;
constexpr int PER_SCALE = GROUP ? GROUP : 1;

__device__ inline uint32_t ones(__half) { return 0x3c003c00u; }
__device__ inline uint32_t ones(__nv_bfloat16) { return 0x3f803f80u; }

// A table, in units of its largest magnitude. Of four entries: two a register. Of more: their low bytes, then their high bytes.
struct Table {
  uint32_t words[ENTRIES / 2];
  float unit;

  __device__ inline void load(const float* from) {
    float entries[ENTRIES];
    unit = 0.0f;
#pragma unroll
    for (int i = 0; i < ENTRIES; ++i) {
      entries[i] = __ldg(from + i);
      unit = fmaxf(unit, fabsf(entries[i]));
    }
    if (unit == 0.0f) unit = 1.0f;
    uint32_t pairs[ENTRIES / 2];
#pragma unroll
    for (int i = 0; i < ENTRIES / 2; ++i) {
      pairs[i] = pack2<Scalar>(__fdiv_rn(entries[2 * i], unit), __fdiv_rn(entries[2 * i + 1], unit));
      words[i] = pairs[i];
    }
    if constexpr (BITS > 2) {
#pragma unroll
      for (int i = 0; i < ENTRIES / 4; ++i) {
        words[i] = __byte_perm(pairs[2 * i], pairs[2 * i + 1], 0x6420);
        words[ENTRIES / 4 + i] = __byte_perm(pairs[2 * i], pairs[2 * i + 1], 0x7531);
      }
    }
  }

  // The bytes that the four low nibbles of `codes` name: of the low bytes, or of the high ones.
  __device__ inline uint32_t bytes(uint32_t codes, int high) const {
    const uint32_t* from = words + high * (ENTRIES / 4);
    if constexpr (BITS == 3) return __byte_perm(from[0], from[1], codes);
    const uint32_t three = codes & 0x7777u, which = (codes >> 1 & 0x4444u) | 0x3210u;
    return __byte_perm(__byte_perm(from[0], from[1], three), __byte_perm(from[2], from[3], three), which);
  }

  // Four columns in a word of nibbles: the values of the low halves of its bytes and of the high ones, two pairs each.
  __device__ inline void look_up(uint32_t nibbles, uint32_t* low, uint32_t* high) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t of_low = bytes(nibbles >> (16 * i), 0), of_high = bytes(nibbles >> (16 * i), 1);
      low[i] = __byte_perm(of_low, of_high, 0x6240);
      high[i] = __byte_perm(of_low, of_high, 0x7351);
    }
  }
};

// The codes of 16 columns of a row: of 2 and 3 bits columns 4 t + i of each 16, i below 4, else 8 t + i of each 32, i below 8.
struct Codes {
  uint32_t words[BITS == 2 ? 1 : BITS == 3 ? 3 : 2];  // of 3 bits: the low two bits of each, and the third ones of the unit

  __device__ inline void load(const uint8_t* unit, int t) {
    if constexpr (BITS == 4) {
      const uint2 both = load_once(reinterpret_cast<const uint2*>(unit) + t);
      words[0] = both.x;
      words[1] = both.y;
    } else {
      words[0] = load_once(reinterpret_cast<const uint32_t*>(unit) + t);
      if constexpr (BITS == 3) {
        const uint2 third = load_once(reinterpret_cast<const uint2*>(unit + 16));
        words[1] = third.x;
        words[2] = third.y;
      }
    }
  }

  // The values in eight pairs, in the order of x.
  __device__ inline void look_up(const Table& table, int t, uint32_t (&pairs)[8]) const {
    if constexpr (BITS == 4) {
#pragma unroll
      for (int j = 0; j < 2; ++j) table.look_up(words[j], pairs + 2 * j, pairs + 4 + 2 * j);
    } else if constexpr (BITS == 3) {
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        uint32_t nibbles = words[0] >> (2 * p) & 0x33333333u;
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // p and p + 2
          const uint32_t third = words[1 + half] >> (16 * p + 4 * t) & 15u;
          nibbles |= (third * 0x00204081u & 0x01010101u) << (2 + 4 * half);
        }
        table.look_up(nibbles, pairs + 2 * p, pairs + 4 + 2 * p);
      }
    } else {
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        const uint32_t bytes = (words[0] >> (2 * p) & 0x03030303u) * 0x22u + 0x10101010u;
        pairs[2 * p] = __byte_perm(table.words[0], table.words[1], bytes);
        pairs[2 * p + 1] = __byte_perm(table.words[0], table.words[1], bytes >> 16);
      }
    }
  }
};

// What belongs to a lane's rows.
struct Weight {
  const uint8_t* packed;
  const float *table, *absmax, *zero;
  long long rows;
  int units, g, t;
  long long row[2];

  __device__ inline void go_to(long long tile) {
#pragma unroll
    for (int r = 0; r < 2; ++r) row[r] = min(tile * TILE + g + 8 * r, rows - 1);
  }
  __device__ inline int groups() const { return GROUP ? (units + PER_SCALE - 1) / PER_SCALE : 1; }
  __device__ inline float scale(int r, int unit) const {
    return absmax ? __ldg(absmax + row[r] * groups() + (GROUP ? unit / PER_SCALE : 0)) : 1.0f;
  }
  __device__ inline float zero_of(int r, int unit) const {
    return __ldg(zero + row[r] * groups() + (GROUP ? unit / PER_SCALE : 0));
  }
};

struct Unit {
  Codes codes[2];
#if GROUP
  float scale[2];
#endif
#if GROUP && ZERO
  float zero[2];
#endif
};

__device__ inline void load(Unit (&to)[TURN], const Weight& w, int turn) {
#pragma unroll
  for (int c = 0; c < TURN; ++c) {
    const int unit = min(turn * TURN + c, w.units - 1);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      to[c].codes[r].load(w.packed + (w.row[r] * w.units + unit) * UNIT_BYTES, w.t);
#if GROUP
      to[c].scale[r] = w.scale(r, unit);
#endif
#if GROUP && ZERO
      to[c].zero[r] = w.zero_of(r, unit);
#endif
    }
  }
}

// x of a unit of token g, in eight pairs.
__device__ inline void load_x(const Scalar* unit, int t, uint32_t (&pairs)[8]) {
  if constexpr (BITS == 4) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint4 eight = __ldg(reinterpret_cast<const uint4*>(unit + 32 * j) + t);
      pairs[4 * j] = eight.x;
      pairs[4 * j + 1] = eight.y;
      pairs[4 * j + 2] = eight.z;
      pairs[4 * j + 3] = eight.w;
    }
  } else {
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const uint2 four = __ldg(reinterpret_cast<const uint2*>(unit + 16 * p) + t);
      pairs[2 * p] = four.x;
      pairs[2 * p + 1] = four.y;
    }
  }
}

KERNEL void __launch_bounds__(THREADS, 2)
    linear_table(const Scalar* __restrict__ x, int tokens, const uint8_t* __restrict__ packed, const float* __restrict__ table,
                 const float* __restrict__ absmax, const float* __restrict__ zero, const Scalar* __restrict__ bias, long long rows,
                 int columns, Scalar* __restrict__ y) {
  __shared__ float sums[2][WARPS][SUMS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int units = columns / UNIT, turns = (units + TURN - 1) / TURN;
  const long long tiles = (rows + TILE - 1) / TILE;
  const Scalar* token = x + (long long)g * columns;

  Weight ahead = {packed, table, absmax, zero, rows, units, g, t};  // the rows of what is loaded next
  Unit next[TURN];
  ahead.go_to(blockIdx.x);
  if (warp < turns) load(next, ahead, warp);
  Table tables[OWN ? 2 : 1];
  if constexpr (!OWN) tables[0].load(table);

  int parity = 0;
  for (long long tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    Weight mine = ahead;
    mine.go_to(tile);
    if constexpr (OWN) {
#pragma unroll
      for (int r = 0; r < 2; ++r) tables[r].load(table + mine.row[r] * ENTRIES);
    }
    const Table &first = tables[0], &second = tables[OWN ? 1 : 0];
    float total[4] = {0, 0, 0, 0};
#if ZERO
    float of_x[4] = {0, 0, 0, 0};
#endif
    for (int turn = warp; turn < turns; turn += WARPS) {
      Unit now[TURN];
#pragma unroll
      for (int c = 0; c < TURN; ++c) now[c] = next[c];
      const bool last = turn + WARPS >= turns;
      if (last) ahead.go_to(tile + gridDim.x);
      load(next, ahead, last ? warp : turn + WARPS);
#pragma unroll
      for (int c = 0; c < TURN; ++c) {
        const int unit = turn * TURN + c;
        uint32_t b[8] = {};
        if (g < tokens && unit < units) load_x(token + unit * UNIT, t, b);
        uint32_t a[2][8];
        now[c].codes[0].look_up(first, t, a[0]);
        now[c].codes[1].look_up(second, t, a[1]);
        float sum[4] = {0, 0, 0, 0};  // over a group's unit
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          const uint32_t both[4] = {a[0][2 * s], a[1][2 * s], a[0][2 * s + 1], a[1][2 * s + 1]};
          mma_16x8x16(GROUP ? sum : total, both, b[2 * s], b[2 * s + 1], Scalar());
        }
#if ZERO
        const uint32_t one = ones(Scalar()), all[4] = {one, one, one, one};
#pragma unroll
        for (int s = 0; s < 4; ++s) mma_16x8x16(of_x, all, b[2 * s], b[2 * s + 1], Scalar());
#endif
#if GROUP
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float product = __fmul_rn(sum[i], i / 2 ? second.unit : first.unit);
#if ZERO
          product -= now[c].zero[i / 2] * of_x[i];
          of_x[i] = 0.0f;
#endif
          total[i] = fmaf(now[c].scale[i / 2], product, total[i]);
        }
#endif
      }
    }
#if !GROUP
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      total[i] = __fmul_rn(total[i], i / 2 ? second.unit : first.unit);
#if ZERO
      total[i] -= mine.zero_of(i / 2, 0) * of_x[i];
#endif
      total[i] = __fmul_rn(total[i], mine.scale(i / 2, 0));
    }
#endif
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
        if (bias) sum += to_float(bias[row]);
        y[m * rows + row] = from_float<Scalar>(sum);
      }
    }
    parity ^= 1;  // the next tile's sums then need not wait until these are read
  }
}
