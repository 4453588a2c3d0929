// A 4-bit weight as operand A of the tensor cores, for linear_4bit.cu and linear_4bit_batch.cu: W = (code value - zero) * absmax.
//
//   packed  uint8 [rows * columns / 2], two codes per byte, the earlier in the high nibble
//   absmax  [rows * columns / block_size]. SCALES says what is stored:
//             0  float32
//             1  uint8 codes of double quantization: map[code] * nested[i / 256] + offset
//             2  DTYPE
//             3  the bits of E8M0 or E4M3: map[bits], divided by nested[0] unless nested is null
//   zero    int8, as many, if ZERO is 1. The code values are then integers.
//
// CHUNK, 32 or 64, divides block_size, which divides columns. With SCALES=3, CHUNK is 64 and divides columns, and block_size is 16
// or 32.
//
// The number of instructions per element matters: the work on 0.5 bytes must not take longer than their transfer.
//   - Decoding takes half a look-up per element. A byte is two codes. A table in shared memory has the pair of 16-bit values of
//     each of the 256 bytes. It has one copy per lane, in the lane's own bank (32 KB), so no look-up waits for another.
//   - Tensor cores make the product (mma m16n8k16): 16 rows of W are its A, eight tokens its B. Sums are float32. The codes'
//     values are rounded to DTYPE; absmax multiplies the sum over a chunk of columns.
//   - The order of k within an mma is free, as long as A and B agree. Lane (g, t) therefore takes the 16 consecutive k
//     at 16 t of a chunk of 64: eight bytes of rows g and g + 8, as they are stored, and 32 bytes of token g.
//   - A zero point is subtracted from two code values at a time, which is half an instruction more per element. Integers up to 256
//     are exact in 16 bits, so nothing is rounded. Its share of the sum, apart, would cost another mma and lose what cancels.
//   - With SCALES=3 a chunk has several blocks, but a lane's 16 k are in one. absmax multiplies the code values, also two at a
//     time. Values have two bits and E4M3 four, so the product is exact in 16 bits, but for what __half has no exponents.
#pragma once

#include "common.cuh"

using Scalar = DTYPE;
constexpr int WORDS = CHUNK / 32;  // words of four bytes that a lane takes from a row's chunk
constexpr int STEPS = CHUNK / 16;  // products over a chunk
constexpr int TILE = 16;           // rows of an mma
constexpr int TURN = 4;            // chunks at a time
constexpr int TABLE = 256 * 32;    // entries

// The values of all bytes: of the codes of double quantization, or of an 8-bit float.
struct ByteMap {
  float value[256];
};

// The map in shared memory. What multiplies two code values at a time is there twice per entry.
constexpr bool MAPPED = SCALES == 1 || SCALES == 3;
#if SCALES == 3
using Entry = uint32_t;
__device__ inline Entry entry_of(float value) { return pack2<Scalar>(value, value); }
#else
using Entry = float;
__device__ inline Entry entry_of(float value) { return value; }
#endif

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

// Two values of W, but for a factor: the value of each code, less the zero point or times absmax if these are in `pair`.
__device__ inline uint32_t values_of(uint32_t codes, uint32_t pair) {
#if ZERO
  return subtract2(codes, pair, Scalar());
#elif SCALES == 3
  return multiply2(codes, pair, Scalar());
#else
  return codes;
#endif
}

// The A operand of step `s` of a chunk: the lane's elements 4s to 4s + 3, in both rows. `mine` is the address of the lane's
// first entry. One permutation extracts a byte, and one multiply-add turns it into an address. `pair` is that of each row.
__device__ inline void decode(uint32_t mine, const Codes& codes, int s, const uint32_t (&pair)[2], uint32_t (&a)[4]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint32_t word = codes.word[r][s / 2];
    a[r] = values_of(load_shared(mine + __byte_perm(word, 0, 0x4440 + s % 2 * 2) * 128), pair[r]);
    a[2 + r] = values_of(load_shared(mine + __byte_perm(word, 0, 0x4441 + s % 2 * 2) * 128), pair[r]);
  }
}

// How absmax is stored, and what holds it in a register.
#if SCALES == 0
using Stored = float;
using Held = float;
#elif SCALES == 2
using Stored = Scalar;
using Held = Scalar;
#else
using Stored = uint8_t;
using Held = uint32_t;
#endif

// The tensors that store absmax and zero points.
struct Scales {
  const Stored* absmax;
  const float* nested;
  float offset;
  const int8_t* zero;
};

// absmax and the zero point of a block as they are stored. They are loaded one turn ahead, so no thread waits for them.
struct RawScale {
  Held value;
#if SCALES == 1
  float group;
#endif
#if ZERO
  int8_t zero;
#endif
};

// The block of a lane's elements in a chunk of a row, counted from the row's first.
__device__ inline int block_of(int chunk, int t, int block_size) {
#if SCALES == 3
  return (CHUNK / 16 * chunk + t) >> (block_size == 32);
#else
  return chunk / (block_size / CHUNK);
#endif
}

__device__ inline RawScale load_scale(const Scales& scales, uint32_t block) {
  RawScale raw;
  raw.value = __ldg(scales.absmax + block);
#if SCALES == 1
  raw.group = __ldg(scales.nested + block / 256);
#endif
#if ZERO
  raw.zero = __ldg(scales.zero + block);
#endif
  return raw;
}

// What all blocks share: the offset of double quantization, or what multiplies each value of an 8-bit float.
__device__ inline float shared_scale(const Scales& scales) {
#if SCALES == 3
  return scales.nested ? __frcp_rn(__ldg(scales.nested)) : 1.0f;
#else
  return scales.offset;
#endif
}

// What multiplies the sum over a chunk. `shared` is that of shared_scale.
__device__ inline float absmax_of(const RawScale& raw, const Entry* map, float shared) {
#if SCALES == 1
  return __fadd_rn(__fmul_rn(map[raw.value], raw.group), shared);
#elif SCALES == 3
  return shared;
#else
  return to_float(raw.value);
#endif
}

// What values_of takes, twice; 0 if it takes nothing.
__device__ inline uint32_t pair_of(const RawScale& raw, const Entry* map) {
#if ZERO
  return pack2<Scalar>(raw.zero, raw.zero);
#elif SCALES == 3
  return map[raw.value];
#else
  return 0;
#endif
}
