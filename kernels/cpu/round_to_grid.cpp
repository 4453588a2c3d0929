// Rounds a weight to the nearest values that its scales allow. The rules are in qcli/ops/round_to_grid.py.

#include "grid.h"

namespace {

struct Weight {
  int64_t rows, columns, size, groups;
  const float *w, *scale, *zero;
  Grid grid;
  uint8_t* codes;
  float* stored;
};

// What 16 columns of a row from `column` on have, of which the values of the row's groups are given.
QCLI_INLINE F32x16 of_columns(const float* of_groups, int64_t column, int64_t count, int64_t size) {
  const int64_t first = column / size;
  if ((column + count - 1) / size == first) return all(of_groups[first]);
  float each[16] = {};
  for (int64_t i = 0; i < count; i++) each[i] = of_groups[(column + i) / size];
  return load(each);
}

template <int kForm>
void round_rows(const Weight& weight, int threads) {
  const Ranks ranks = ranks_of(weight.grid);
  parallel(weight.rows, divide_up(kGrain, weight.columns), threads, [=, &weight, &ranks](int64_t first, int64_t last) {
    const Tables tables = tables_of(ranks);
    for (int64_t row = first; row < last; row++) {
      const float* zeros = weight.zero ? weight.zero + row * weight.groups : nullptr;
      for (int64_t column = 0; column < weight.columns; column += 16) {
        const int64_t count = smaller<int64_t>(16, weight.columns - column), at = row * weight.columns + column;
        const F32x16 scale = of_columns(weight.scale + row * weight.groups, column, count, weight.size);
        const F32x16 zero = zeros ? of_columns(zeros, column, count, weight.size) : all(0.0f);
        F32x16 value = load_some(weight.w + at, count) / divisor<kForm>(scale);
        const I32x16 code = nearest_code<kForm>(&value, zero, weight.grid, tables);
        store_some(weight.stored + at, as_stored(weight.grid.dtype, value * scale), count);
        store_codes_of<kForm>(weight.codes + at, code, count);
      }
    }
  });
}

}  // namespace

// w float32 [rows, columns]; scale and zero float32 [rows, groups], the latter null without zero points: column k has the group
// k / size. The grid as in gptq_columns. codes bytes, stored float32 [rows, columns].
QCLI_KERNEL(round_to_grid)
(int64_t rows, int64_t columns, int64_t size, int64_t groups, const float* w, const float* scale, const float* zero, int form,
 float least, float most, const float* thresholds, const float* values, const float* codes_of_ranks, int dtype, uint8_t* codes,
 float* stored, int threads) {
  const Grid grid = {least, most, thresholds, values, codes_of_ranks, dtype};
  const Weight weight = {rows, columns, size, groups, w, scale, zero, grid, codes, stored};
  QCLI_FORM(form, round_rows, weight, threads)
}
