// The codes of rows under their tables, and what rounding cost. The rules are in qcli/ops/round_to_table.py.
//
// A table is in registers, and the middles of its entries are searched in four steps. Rows of a value that is not finite take the
// same way with checks.

#include "rounding.h"

namespace {

template <class T, bool kChecked>
QCLI_INLINE void encode(const T* x, int64_t count, Table16 tree, Table16 values, uint8_t* codes, Sums* total) {
  Sums sums = *total;
  for (int64_t i = 0; i < count; i += 16) {
    const F32x16 w = load_some(x + i, count - i);
    // A sum with +-infinity is no number, as one with NaN.
    const I32x16 code = rank16(tree, kChecked ? where_number(w - w, w, all(0.0f)) : w);
    store_some_bytes(codes + i, code, count - i);
    F32x16 stored = look_up<0>(values, code);
    if (count - i < 16) {  // what is beyond the row costs nothing
      float some[16] = {};
      store(some, stored);
      for (int64_t lane = count - i; lane < 16; lane++) some[lane] = 0;
      stored = load(some);
    }
    note<kChecked>(w, stored, &sums);
  }
  *total = sums;
}

template <class T>
void run(const void* input, int64_t rows, int64_t columns, int entries, const float* tables, uint8_t* codes, double* partial,
         int threads) {
  const T* x = static_cast<const T*>(input);
  parallel(rows, divide_up(kGrain, larger<int64_t>(columns, 1)), threads, [=](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const float* table = tables + row * entries;
      float values[16] = {}, middles[15];
      for (int k = 0; k < entries; k++) values[k] = table[k];
      for (int k = 0; k < 15; k++) middles[k] = k + 1 < entries ? (table[k + 1] + table[k]) / 2 : from_bits(kInfinity);
      const Search16 search = search16(middles);
      const Table16 tree = table16(search.tree), found = table16(values);
      Sums sums = no_sums();
      if (largest_magnitude(x + row * columns, columns) < kInfinity) {
        encode<T, false>(x + row * columns, columns, tree, found, codes + row * columns, &sums);
      } else {
        encode<T, true>(x + row * columns, columns, tree, found, codes + row * columns, &sums);
      }
      write_sums(sums, partial + 3 * row);
    }
  });
}

}  // namespace

// x [rows, columns] of `dtype`; tables float32 [rows, entries], 4, 8 or 16 of them; codes [rows, columns]. partial float64 [rows, 3]:
// squared error, squared norm and non-finite elements.
QCLI_KERNEL(round_to_table)
(const void* x, int dtype, int64_t rows, int64_t columns, int entries, const float* tables, uint8_t* codes, double* partial,
 int threads) {
  QCLI_DISPATCH(dtype, run, x, rows, columns, entries, tables, codes, partial, threads)
}
