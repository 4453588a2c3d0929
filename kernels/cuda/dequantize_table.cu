// The values of codes that name entries of a table: (table[code] - zero) * absmax in float32, rounded once.
//
//   packed  uint8 [rows, units of 8 BITS bytes], as pack_planes in qcli/packing.py lays them out: a unit has 64 columns
//   table   float32 [2^BITS], or [rows, 2^BITS] if OWN is 1
//   absmax  float32 [rows, groups], or null;  zero likewise
//   out     DTYPE [rows, columns]
//
// A lane takes eight consecutive columns: the codes of all eight lie in eight bytes, at one shift. Caches keep the table.
// prebuilt: DTYPE={float,__half,__nv_bfloat16} BITS={2,3,4} OWN={0,1}
#include "common.cuh"

using Scalar = DTYPE;
constexpr int UNIT = 64;  // columns
constexpr int UNIT_BYTES = 8 * BITS;

KERNEL void __launch_bounds__(256)
    dequantize_table(const uint8_t* __restrict__ packed, const float* __restrict__ table, const float* __restrict__ absmax,
                     const float* __restrict__ zero, long long block_size, long long rows, long long columns,
                     Scalar* __restrict__ out) {
  const long long eights = (columns + 7) / 8, units = (columns + UNIT - 1) / UNIT, groups = (columns + block_size - 1) / block_size;
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < rows * eights; i += (long long)gridDim.x * blockDim.x) {
    const long long row = i / eights, column = i % eights * 8;
    const int c = int(column % UNIT), step = BITS == 4 ? 32 : 16;
    const uint8_t* unit = packed + (row * units + column / UNIT) * UNIT_BYTES;
    const uint2 bytes = __ldg(reinterpret_cast<const uint2*>(unit + c % step));
    const int shift = c / step * (BITS == 4 ? 4 : 2);
    const uint32_t third = BITS == 3 ? unit[16 + c / 8] : 0;
    const float* entries = OWN ? table + (row << BITS) : table;
    float values[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      uint32_t code = (j < 4 ? bytes.x : bytes.y) >> (8 * (j % 4) + shift) & (BITS == 4 ? 15u : 3u);
      if constexpr (BITS == 3) code |= (third >> j & 1u) << 2;
      const long long group = row * groups + min(column + j, columns - 1) / block_size;
      values[j] = __ldg(entries + code);
      if (zero) values[j] = __fsub_rn(values[j], __ldg(zero + group));
      if (absmax) values[j] = __fmul_rn(values[j], __ldg(absmax + group));
    }
    Scalar* to = out + row * columns + column;
    if (columns % 8 == 0) {
      store8(to, values);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (column + j < columns) to[j] = from_float<Scalar>(values[j]);
      }
    }
  }
}
