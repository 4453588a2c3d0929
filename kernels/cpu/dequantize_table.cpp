// The values of codes that name entries of a table: (table[c] - zero) * absmax in float32, rounded once to the wanted dtype; the
// definition is in qcli/ops/dequantize_table.py.

#include "planes.h"

namespace {

template <int kBits, class T>
void dequantize(const uint8_t* packed, const float* table, int own_tables, const float* absmax, const float* zero, int64_t block_size,
                int64_t rows, int64_t k, T* out, int threads) {
  const int64_t row_bytes = divide_up(k, kUnit) * unit_bytes(kBits), groups = divide_up(k, block_size);
  parallel(rows, larger<int64_t>(1, (1 << 15) / k), threads, [=](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; n++) {
      float entries[16];
      repeat_table<kBits>(table + (own_tables ? n << kBits : 0), entries);
      const float *of_row = absmax ? absmax + n * groups : nullptr, *zeros = zero ? zero + n * groups : nullptr;
      T* const to = out + n * k;
      each_sixteen<kBits>(packed + n * row_bytes, k, table16(entries), [=](int64_t i, int64_t count, F32x16 values) {
        const int64_t g = i / block_size;
        if (count == 16 && (i + 15) / block_size == g && !(of_row && !__builtin_isfinite(of_row[g]))) {
          if (zeros) values = values - all(zeros[g]);
          if (of_row) values = values * all(of_row[g]);
          store(to + i, values);
          return;
        }
        float some[16];
        store(some, values);
        for (int64_t j = 0; j < count; j++) {
          const int64_t group = (i + j) / block_size;
          float value = some[j];
          if (zeros) value -= zeros[group];
          if (of_row) value *= of_row[group];
          from_float(value, to + i + j);  // which also rounds a NaN to a NaN
        }
      });
    }
  });
}

template <class T>
void dequantize(const uint8_t* packed, const float* table, int own_tables, const float* absmax, const float* zero, int bits,
                int64_t block_size, int64_t rows, int64_t k, void* output, int threads) {
  T* out = static_cast<T*>(output);
  switch (bits) {
    case 2: dequantize<2>(packed, table, own_tables, absmax, zero, block_size, rows, k, out, threads); break;
    case 3: dequantize<3>(packed, table, own_tables, absmax, zero, block_size, rows, k, out, threads); break;
    default: dequantize<4>(packed, table, own_tables, absmax, zero, block_size, rows, k, out, threads); break;
  }
}

}  // namespace

// packed uint8 [rows, bytes]; table float32 [2^bits], or [rows, 2^bits] with own_tables; absmax and zero float32 [rows, groups], or
// null; out [rows, k] of `dtype`.
QCLI_KERNEL(dequantize_table)
(const uint8_t* packed, const float* table, int own_tables, const float* absmax, const float* zero, int bits, int64_t block_size,
 int64_t rows, int64_t k, int dtype, void* out, int threads) {
  QCLI_DISPATCH(dtype, dequantize, packed, table, own_tables, absmax, zero, bits, block_size, rows, k, out, threads)
}
