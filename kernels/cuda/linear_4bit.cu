// The product with a 4-bit weight for up to eight tokens: y[m, n] = sum over k of x[m, k] W[n, k], plus bias[n].
//
//   x     DTYPE (__half, __nv_bfloat16) [tokens, columns]
//   bias  DTYPE [rows], or null
//   y     DTYPE [tokens, rows];  the weight as in linear_4bit.cuh
//   FULL  chunks per block, 1 or 2, if columns are a multiple of 4 * CHUNK: no turn is partial, and one load gets absmax of a row;
//         1 with SCALES=3 if they are such a multiple; else 0
//
// The limit is the bandwidth at which the weight is read: 0.5 bytes and sizeof(absmax) / block_size per element, and with ZERO
// 1 / block_size. One token costs as much as eight. A block takes 16 rows at a time. Its warps divide the columns; a warp takes
// four chunks per turn, while the next turn is loading. The warps' sums are added in shared memory. There are only as many blocks
// as run at once, and they stay until no rows are left, because filling the table costs about as much as a tile. The first loads
// run meanwhile.
// prebuilt: DTYPE={__half,__nv_bfloat16} CHUNK={32} SCALES={0,1,2} FULL={0,1}
// prebuilt: DTYPE={__half,__nv_bfloat16} CHUNK={64} SCALES={0,1,2} FULL={0,1,2}
// prebuilt: DTYPE={__half,__nv_bfloat16} CHUNK={32} SCALES={2} ZERO={1} FULL={0,1}
// prebuilt: DTYPE={__half,__nv_bfloat16} CHUNK={64} SCALES={2} ZERO={1} FULL={0,1,2}
// prebuilt: DTYPE={__half,__nv_bfloat16} CHUNK={64} SCALES={3} FULL={0,1}
#include "linear_4bit.cuh"

constexpr int WARPS = 8;
constexpr int PITCH = TILE + 4;  // floats per token's sums; the padding spreads a warp's sums over all banks
constexpr int SUMS = 8 * PITCH;
constexpr bool ONE_LOAD = FULL && SCALES != 3;
constexpr int LOADED = TURN / (FULL ? FULL : 1);  // blocks of such a load

// The part of the weight that a lane reads: rows g and g + 8 of a tile.
struct Rows {
  const uint8_t* packed[2];  // at the lane's position in the first chunk
  uint32_t block[2];         // the number of the row's first block
};

// Rows beyond the last one read the last one. Their results are not stored.
__device__ inline Rows rows_of(const uint8_t* packed, long long tile, long long rows, int columns, int blocks, int g,
                               int t) {
  Rows r;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const long long row = min(tile * TILE + g + 8 * i, rows - 1);
    r.packed[i] = packed + row * (columns / 2) + t * (CHUNK / 8);
    r.block[i] = uint32_t(row * blocks);
  }
  return r;
}

__device__ inline void load_codes(const Rows& rows, int chunk, Codes& codes) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint8_t* from = rows.packed[r] + chunk * (CHUNK / 2);
    if constexpr (WORDS == 2) {
      const uint2 pair = load_once(reinterpret_cast<const uint2*>(from));
      codes.word[r][0] = pair.x;
      codes.word[r][1] = pair.y;
    } else {
      codes.word[r][0] = load_once(reinterpret_cast<const uint32_t*>(from));
    }
  }
}

// Words of so many bytes.
template <int BYTES>
struct Word;
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// Loads LOADED elements from an address that is a multiple of their total size.
template <class T>
__device__ inline void load_together(const T* from, T (&to)[LOADED]) {
  using Bits = typename Word<LOADED * sizeof(T)>::type;
  const Bits bits = __ldg(reinterpret_cast<const Bits*>(from));
  memcpy(static_cast<void*>(to), &bits, sizeof to);
}

// Loads what belongs to the chunks of a turn: of LOADED blocks from `block` on, a multiple of LOADED, and in one group of 256.
__device__ inline void load_scales(const Scales& scales, uint32_t block, RawScale (&raw)[TURN]) {
  Stored values[LOADED];
  load_together(scales.absmax + block, values);
#pragma unroll
  for (int i = 0; i < TURN; ++i) raw[i].value = values[i * LOADED / TURN];
#if SCALES == 1
  const float group = __ldg(scales.nested + block / 256);
#pragma unroll
  for (int i = 0; i < TURN; ++i) raw[i].group = group;
#endif
#if ZERO
  int8_t zeros[LOADED];
  load_together(scales.zero + block, zeros);
#pragma unroll
  for (int i = 0; i < TURN; ++i) raw[i].zero = zeros[i * LOADED / TURN];
#endif
}

KERNEL void __launch_bounds__(WARPS * 32, 2)
    linear_4bit(const Scalar* __restrict__ x, int tokens, const uint8_t* __restrict__ packed, const Stored* __restrict__ absmax,
                const float* __restrict__ nested, float offset, const Scalar* __restrict__ bias, long long rows,
                int columns, int block_size, const __grid_constant__ Codebook codebook,
                const __grid_constant__ ByteMap byte_map, const int8_t* __restrict__ zero, Scalar* __restrict__ y) {
  DYNAMIC_SHARED(uint32_t, table);
  float* sums = reinterpret_cast<float*>(table + TABLE);           // [2][WARPS][8][PITCH]
  Entry* map = reinterpret_cast<Entry*>(sums + 2 * WARPS * SUMS);  // [256]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int chunks = columns / CHUNK, turns = (chunks + TURN - 1) / TURN;
  const int blocks = columns / block_size;
  const long long tiles = (rows + TILE - 1) / TILE;
  const uint32_t mine = shared_address(table + lane);
  const Scales scales = {absmax, nested, offset, zero};
  const float shared = shared_scale(scales);
  const Scalar* token = x + (long long)g * columns + t * (CHUNK / 4);

  // This warp's work: one turn after the other, over all tiles of the block. Each turn is loaded one turn ahead. After the last
  // turn the last rows are loaded once more, without use.
  Codes next[TURN];
  RawScale next_scale[2][TURN];
  Rows from = rows_of(packed, blockIdx.x, rows, columns, blocks, g, t);
  auto load = [&](int turn) {
#pragma unroll
    for (int c = 0; c < TURN; ++c) load_codes(from, FULL ? turn * TURN + c : min(turn * TURN + c, chunks - 1), next[c]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if constexpr (ONE_LOAD) {
        load_scales(scales, from.block[r] + turn * LOADED, next_scale[r]);
      } else {
#pragma unroll
        for (int c = 0; c < TURN; ++c) {
          const int chunk = FULL ? turn * TURN + c : min(turn * TURN + c, chunks - 1);
          next_scale[r][c] = load_scale(scales, from.block[r] + block_of(chunk, t, block_size));
        }
      }
    }
  };
  if (warp < turns) load(warp);

  fill_table(table, codebook);
  if constexpr (MAPPED) {
    for (int i = threadIdx.x; i < 256; i += blockDim.x) map[i] = entry_of(byte_map.value[i]);
  }
  __syncthreads();

  int parity = 0;
  for (long long tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float total[4] = {0, 0, 0, 0};
    for (int turn = warp; turn < turns; turn += WARPS) {
      Codes codes[TURN];
      float scale[2][TURN];
      uint32_t pair[TURN][2];
#pragma unroll
      for (int c = 0; c < TURN; ++c) {
        codes[c] = next[c];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float value = absmax_of(next_scale[r][c], map, shared);
          scale[r][c] = FULL || turn * TURN + c < chunks ? value : 0.0f;
          pair[c][r] = pair_of(next_scale[r][c], map);
        }
      }
      const bool last = turn + WARPS >= turns;
      if (last) from = rows_of(packed, tile + gridDim.x, rows, columns, blocks, g, t);
      load(last ? warp : turn + WARPS);
      uint32_t b[2][2 * STEPS] = {};  // x of this chunk and of the next one
      auto load_tokens = [&](int c) {
        const int chunk = turn * TURN + c;
        const bool there = g < tokens && (FULL || chunk < chunks);
        const uint4* values = reinterpret_cast<const uint4*>(token + chunk * CHUNK);
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
          const uint4 bits = there ? __ldg(values + i) : make_uint4(0, 0, 0, 0);
          b[c % 2][4 * i] = bits.x;
          b[c % 2][4 * i + 1] = bits.y;
          b[c % 2][4 * i + 2] = bits.z;
          b[c % 2][4 * i + 3] = bits.w;
        }
      };
      load_tokens(0);
#pragma unroll
      for (int c = 0; c < TURN; ++c) {
        if (c + 1 < TURN) load_tokens(c + 1);
        float sum[4] = {0, 0, 0, 0};
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
          uint32_t a[4];
          decode(mine, codes[c], s, pair[c], a);
          mma_16x8x16(sum, a, b[c % 2][2 * s], b[c % 2][2 * s + 1], Scalar());
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) total[i] = fmaf(scale[i / 2][c], sum[i], total[i]);
      }
    }
    // The order is [token][row], so neighbouring threads write neighbouring rows.
    float* here = sums + parity * WARPS * SUMS;
#pragma unroll
    for (int i = 0; i < 4; ++i) here[warp * SUMS + (2 * t + i % 2) * PITCH + g + 8 * (i / 2)] = total[i];
    __syncthreads();
    if (threadIdx.x < TILE * 8) {
      const long long row = tile * TILE + threadIdx.x % TILE;
      const int m = threadIdx.x / TILE;
      if (row < rows && m < tokens) {
        float sum = bias ? to_float(bias[row]) : 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) sum += here[i * SUMS + m * PITCH + threadIdx.x % TILE];
        y[(long long)m * rows + row] = from_float<Scalar>(sum);
      }
    }
    parity ^= 1;  // the next tile's sums then need not wait until these are read
  }
}
