// A 4-bit weight as operand A of the tensor cores, for linear_4bit.cu and linear_4bit_batch.cu.
//
//   packed  uint8 [rows * columns / 2], two codes per byte, the earlier in the high nibble; W = code value * absmax
//   absmax  float32 [rows * columns / block_size]; with NESTED its uint8 codes: map[code] * nested[i / 256] + offset
//
// CHUNK, 32 or 64, divides block_size, which divides columns.
//
// The number of instructions per element matters: the work on 0.5 bytes must not take longer than their transfer.
//   - Decoding takes half a look-up per element. A byte is two codes. A table in shared memory has the pair of 16-bit values of
//     each of the 256 bytes. It has one copy per lane, in the lane's own bank (32 KB), so no look-up waits for another.
//   - Tensor cores make the product (mma m16n8k16): 16 rows of W are its A, eight tokens its B. Sums are float32. The codes'
//     values are rounded to DTYPE; absmax multiplies the sum over a chunk of columns.
//   - The order of k within an mma is free, as long as A and B agree. Lane (g, t) therefore takes the 16 consecutive k
//     at 16 t of a chunk of 64: eight bytes of rows g and g + 8, as they are stored, and 32 bytes of token g.
#pragma once

#include "common.cuh"

using Scalar = DTYPE;
constexpr int WORDS = CHUNK / 32;  // words of four bytes that a lane takes from a row's chunk
constexpr int STEPS = CHUNK / 16;  // products over a chunk
constexpr int TILE = 16;           // rows of an mma
constexpr int TURN = 4;            // chunks at a time
constexpr int TABLE = 256 * 32;    // entries

struct DynamicMap {
  float value[256];
};

// A lane's codes of a chunk, in two rows.
struct Codes {
  uint32_t word[2][WORDS];
};

__device__ inline void fill_table(uint32_t* table, const Codebook& codebook) {
  // A block has eight warps. Each fills the 32 copies of one byte's entry at a time.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 8
  for (int i = 0; i < 256 / 8; ++i) {
    const int byte = i * 8 + warp;
    table[byte * 32 + lane] = pack2<Scalar>(codebook.value[byte >> 4], codebook.value[byte & 15]);
  }
}

// The A operand of step `s` of a chunk: the lane's elements 4s to 4s + 3, in both rows. `mine` is the address of the lane's
// first entry. One permutation extracts a byte, and one multiply-add turns it into an address.
__device__ inline void decode(uint32_t mine, const Codes& codes, int s, uint32_t (&a)[4]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint32_t word = codes.word[r][s / 2];
    a[r] = load_shared(mine + __byte_perm(word, 0, 0x4440 + s % 2 * 2) * 128);
    a[2 + r] = load_shared(mine + __byte_perm(word, 0, 0x4441 + s % 2 * 2) * 128);
  }
}

// The tensors that store absmax.
struct Scales {
  const void* absmax;
  const float* nested;
  float offset;
};

// absmax of a block as it is stored. It is loaded one turn ahead, so no thread waits for it.
struct RawScale {
#if NESTED
  uint32_t code;
  float group;
#else
  float value;
#endif
};

__device__ inline RawScale load_scale(const Scales& scales, uint32_t block) {
#if NESTED
  return {__ldg(static_cast<const uint8_t*>(scales.absmax) + block), __ldg(scales.nested + block / 256)};
#else
  return {__ldg(static_cast<const float*>(scales.absmax) + block)};
#endif
}

// Loads absmax of TURN blocks from `block` on, a multiple of TURN: all in one load, and in one group of 256.
__device__ inline void load_scales(const Scales& scales, uint32_t block, RawScale (&raw)[TURN]) {
#if NESTED
  const uint32_t codes = __ldg(reinterpret_cast<const uint32_t*>(static_cast<const uint8_t*>(scales.absmax) + block));
  const float group = __ldg(scales.nested + block / 256);
#pragma unroll
  for (int i = 0; i < TURN; ++i) raw[i] = {codes >> 8 * i & 0xff, group};
#else
  const float4 four = __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(scales.absmax) + block));
  raw[0] = {four.x};
  raw[1] = {four.y};
  raw[2] = {four.z};
  raw[3] = {four.w};
#endif
}

__device__ inline float absmax_of(const RawScale& raw, const float* map, float offset) {
#if NESTED
  return __fadd_rn(__fmul_rn(map[raw.code], raw.group), offset);
#else
  return raw.value;
#endif
}
