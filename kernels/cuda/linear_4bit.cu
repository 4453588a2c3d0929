// The product with a 4-bit weight for few tokens: y[m, n] = sum over k of x[m, k] W[n, k], plus bias[n].
//
//   x       DTYPE (__half, __nv_bfloat16) [tokens, columns], columns a multiple of CHUNK
//   packed  uint8 [rows * columns / 2], two codes a byte, the earlier in the high nibble; W = code value * absmax
//   absmax  float32 [rows * columns / block_size]; with NESTED its uint8 codes: map[code] * nested[i / 256] + offset
//   FULL    1 where columns are a multiple of 4 CHUNK, else 0
//   bias    DTYPE [rows], or null;  y DTYPE [tokens, rows]
//
// The limit is the bandwidth at which the weight is read: 0.5 bytes, and 4 / block_size (1 / block_size with NESTED), per
// element. So what an element costs in instructions counts:
//   - Decoding takes half a look-up: a byte is two codes, and a table in shared memory holds the pair of 16-bit values of each
//     of the 256 bytes, once per lane, in the lane's own bank (32 KB), so that no look-up waits for another.
//   - The product is the tensor cores' (mma m16n8k16): 16 rows of W are its A, up to eight tokens its B, and one token costs as
//     much as eight. Sums are float32. Values of the code are rounded to DTYPE, absmax is applied to sums over CHUNK elements.
//   - An mma does not care which k it calls its 2t, as long as A and B agree. Lane (g, t) therefore takes the 16 consecutive k
//     at 16 t of a chunk of 64: eight bytes of rows g and g + 8, as they are stored, and 32 bytes of token g.
//
// linear_4bit: up to eight tokens. A block takes 16 rows at a time, its warps share the columns, four chunks a turn, with the
// next turn's loads under way; their sums meet in shared memory. Blocks stay until no rows are left: the table costs
// about as much as two tiles.
#include "common.cuh"

using Scalar = DTYPE;
static_assert(BLOCK_SIZE >= 32 && BLOCK_SIZE % 32 == 0, "a chunk has one absmax");
constexpr int CHUNK = BLOCK_SIZE % 64 ? 32 : 64;
constexpr int WORDS = CHUNK / 32;  // of four bytes, that a lane takes of a row's chunk
constexpr int TILE = 16;           // rows of an mma
constexpr int WARPS = 8;
constexpr int TURN = 4;  // chunks
constexpr int TABLE = 256 * 32;

struct DynamicMap {
  float value[256];
};

// What a lane loads of two rows' chunk.
struct Codes {
  uint32_t word[2][WORDS];
};

// The part of the weight that a lane reads: rows g and g + 8 of a tile.
struct Rows {
  const uint8_t* packed[2];  // at the lane's place in the first chunk
  uint32_t block[2];         // the number of the row's first block
};

__device__ inline void fill_table(uint32_t* table, const Codebook& codebook) {
  for (int i = threadIdx.x; i < TABLE; i += blockDim.x) {
    const int byte = i / 32;
    table[i] = pack2<Scalar>(codebook.value[byte >> 4], codebook.value[byte & 15]);
  }
}

// Rows beyond the last read the last: what comes of them is not stored.
__device__ inline Rows rows_of(const uint8_t* packed, long long tile, long long rows, int columns, int g, int t) {
  Rows r;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const long long row = min(tile * TILE + g + 8 * i, rows - 1);
    r.packed[i] = packed + row * (columns / 2) + t * (CHUNK / 8);
    r.block[i] = uint32_t(row * (columns / BLOCK_SIZE));
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

// absmax of TURN chunks from `chunk` on; 0 beyond the last one.
__device__ inline void load_scales(const void* absmax, const float* nested, float offset, const float* map, uint32_t row_block,
                                   int chunk, int chunks, float (&scale)[TURN]) {
  if constexpr (FULL && BLOCK_SIZE == CHUNK) {  // a row has a multiple of four blocks: one load, and one group of 256
    const uint32_t block = row_block + chunk;
#if NESTED
    const uint32_t codes = __ldg(reinterpret_cast<const uint32_t*>(static_cast<const uint8_t*>(absmax) + block));
    const float group = __ldg(nested + block / 256);
#pragma unroll
    for (int c = 0; c < TURN; ++c) scale[c] = __fadd_rn(__fmul_rn(map[codes >> 8 * c & 0xff], group), offset);
#else
    const float4 four = __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(absmax) + block));
    scale[0] = four.x;
    scale[1] = four.y;
    scale[2] = four.z;
    scale[3] = four.w;
#endif
  } else {
#pragma unroll
  for (int c = 0; c < TURN; ++c) {
    const uint32_t block = row_block + uint32_t(min(chunk + c, chunks - 1)) * CHUNK / BLOCK_SIZE;
#if NESTED
    const int code = __ldg(static_cast<const uint8_t*>(absmax) + block);
    const float value = __fadd_rn(__fmul_rn(map[code], __ldg(nested + block / 256)), offset);
#else
    const float value = __ldg(static_cast<const float*>(absmax) + block);
#endif
    scale[c] = FULL || chunk + c < chunks ? value : 0.0f;
  }
  }
}

// The A operand of step `s` of a chunk: elements 4s to 4s + 3 of the lane's own, of both rows. `mine` is where
// the lane's entries begin. // A permutation takes a byte out in one instruction, and one multiply-add makes it an address.
__device__ inline void decode(uint32_t mine, const Codes& codes, int s, uint32_t (&a)[4]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint32_t word = codes.word[r][s / 2];
    a[r] = load_shared(mine + __byte_perm(word, 0, 0x4440 + s % 2 * 2) * 128);
    a[2 + r] = load_shared(mine + __byte_perm(word, 0, 0x4441 + s % 2 * 2) * 128);
  }
}

KERNEL void __launch_bounds__(WARPS * 32, 2)
    linear_4bit(const Scalar* __restrict__ x, int tokens, const uint8_t* __restrict__ packed, const void* __restrict__ absmax,
                const float* __restrict__ nested, float offset, const Scalar* __restrict__ bias, long long rows,
                int columns, const __grid_constant__ Codebook codebook, const __grid_constant__ DynamicMap dynamic_map,
                Scalar* __restrict__ y) {
  DYNAMIC_SHARED(uint32_t, table);
  float* sums = reinterpret_cast<float*>(table + TABLE);  // [2][WARPS][TILE * 8]
  float* map = sums + 2 * WARPS * TILE * 8;               // [256]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int chunks = columns / CHUNK, turns = (chunks + TURN - 1) / TURN;
  const long long tiles = (rows + TILE - 1) / TILE;
  const uint32_t mine = shared_address(table + lane);
  const Scalar* token = x + (long long)g * columns + t * (CHUNK / 4);

  fill_table(table, codebook);
#if NESTED
  for (int i = threadIdx.x; i < 256; i += blockDim.x) map[i] = dynamic_map.value[i];
#endif
  __syncthreads();

  // This warp's work, one turn after the other over all of the block's tiles, each loaded one turn ahead. After the last the
  // last rows are loaded once more, for nothing.
  Codes next[TURN];
  float next_scale[2][TURN];
  Rows from = rows_of(packed, blockIdx.x, rows, columns, g, t);
  auto load = [&](int turn) {
#pragma unroll
    for (int c = 0; c < TURN; ++c) load_codes(from, FULL ? turn * TURN + c : min(turn * TURN + c, chunks - 1), next[c]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      load_scales(absmax, nested, offset, map, from.block[r], turn * TURN, chunks, next_scale[r]);
    }
  };
  int parity = 0;
  if (warp < turns) load(warp);
  for (long long tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float total[4] = {0, 0, 0, 0};
    for (int turn = warp; turn < turns; turn += WARPS) {
      Codes codes[TURN];
      float scale[2][TURN];
#pragma unroll
      for (int c = 0; c < TURN; ++c) {
        codes[c] = next[c];
        scale[0][c] = next_scale[0][c];
        scale[1][c] = next_scale[1][c];
      }
      const bool last = turn + WARPS >= turns;
      if (last) from = rows_of(packed, tile + gridDim.x, rows, columns, g, t);
      load(last ? warp : turn + WARPS);
      uint32_t b[2][CHUNK / 8] = {};  // x of this chunk and of the next
      auto load_tokens = [&](int c) {
        const int chunk = FULL ? turn * TURN + c : min(turn * TURN + c, chunks - 1);
        const uint4* values = reinterpret_cast<const uint4*>(token + chunk * CHUNK);
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
          const uint4 bits = g < tokens ? __ldg(values + i) : make_uint4(0, 0, 0, 0);
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
        for (int s = 0; s < CHUNK / 16; ++s) {
          uint32_t a[4];
          decode(mine, codes[c], s, a);
          mma_16x8x16(sum, a, b[c % 2][2 * s], b[c % 2][2 * s + 1], Scalar());
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) total[i] = fmaf(scale[i / 2][c], sum[i], total[i]);
      }
    }
    // [token][row], so that neighbouring threads write neighbouring rows.
    float* here = sums + parity * WARPS * TILE * 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) here[warp * TILE * 8 + (2 * t + i % 2) * TILE + g + 8 * (i / 2)] = total[i];
    __syncthreads();
    if (threadIdx.x < TILE * 8) {
      const long long row = tile * TILE + threadIdx.x % TILE;
      const int m = threadIdx.x / TILE;
      if (row < rows && m < tokens) {
        float sum = bias ? to_float(bias[row]) : 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) sum += here[i * TILE * 8 + threadIdx.x];
        y[(long long)m * rows + row] = from_float<Scalar>(sum);
      }
    }
    parity ^= 1;  // so the next tile's sums need not wait until these are read
  }
}
