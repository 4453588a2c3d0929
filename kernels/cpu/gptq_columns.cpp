// A block of columns under GPTQ: each is rounded, and what it is off by is made up for in the later ones. The rules are in
// qcli/ops/gptq_columns.py.
//
// A lane is a row of the weight, so that nothing is added across lanes. A column takes what it owes to the earlier ones when its turn
// comes, in their order: the sums then stay in registers, and the errors of 64 rows in L1. Nothing here is a fused multiply-add:
// every variant gives the same bits.

#include "grid.h"

namespace {

struct Block {
  int64_t columns, rows;
  const float *w, *lower, *scale, *zero;
  const int32_t* groups;
  Grid grid;
  uint8_t* codes;
  float *stored, *errors;
};

// 16 kVectors rows from `row` on, of which `count` are there. errors [columns, 16 kVectors] is scratch.
template <int kForm, int kVectors>
QCLI_INLINE void round_rows(const Block& b, const Tables& tables, int64_t row, int64_t count, float* errors) {
  constexpr int kWidth = 16 * kVectors;
  for (int64_t j = 0; j < b.columns; j++) {
    F32x16 w[kVectors];
    for (int v = 0; v < kVectors; v++) w[v] = load_some(b.w + j * b.rows + row + 16 * v, count - 16 * v);
    const float* owed = b.lower + j * b.columns;
    for (int64_t i = 0; i < j; i++) {
      const F32x16 share = all(owed[i]);
      for (int v = 0; v < kVectors; v++) w[v] = w[v] - share * load(errors + i * kWidth + 16 * v);
    }
    const F32x16 pivot = all(owed[j]);
    const int64_t group = b.groups[j] * b.rows + row;
    for (int v = 0; v < kVectors; v++) {
      const int64_t left = count - 16 * v, at = j * b.rows + row + 16 * v;
      const F32x16 scale = load_some(b.scale + group + 16 * v, left);
      const F32x16 zero = b.zero ? load_some(b.zero + group + 16 * v, left) : all(0.0f);
      F32x16 value = w[v] / divisor<kForm>(scale);
      const I32x16 code = nearest_code<kForm>(&value, zero, b.grid, tables);
      value = as_stored(b.grid.dtype, value * scale);
      const F32x16 error = (w[v] - value) / pivot;
      store(errors + j * kWidth + 16 * v, error);
      store_some(b.errors + at, error, left);
      store_some(b.stored + at, value, left);
      store_codes_of<kForm>(b.codes + at, code, left);
    }
  }
}

template <int kForm>
void round_block(const Block& b, int threads) {
  const Ranks ranks = ranks_of(b.grid);
  parallel(divide_up(b.rows, 64), 1, threads, [=, &b, &ranks](int64_t first, int64_t last) {
    const Tables tables = tables_of(ranks);
    const Scratch scratch(b.columns * 64 * sizeof(float));
    for (int64_t tile = first; tile < last; tile++) {
      const int64_t row = tile * 64, count = smaller<int64_t>(64, b.rows - row);
      if (count == 64) {
        round_rows<kForm, 4>(b, tables, row, 64, scratch.as<float>());
        continue;
      }
      for (int64_t done = 0; done < count; done += 16) {
        round_rows<kForm, 1>(b, tables, row + done, smaller<int64_t>(16, count - done), scratch.as<float>());
      }
    }
  });
}

}  // namespace

// w float32 [columns, rows]. lower float32 [columns, columns] has in row j what column j owes to the error of each earlier one, and
// at j what its own is divided by. scale and zero float32 [groups, rows], the latter null without zero points; groups int32
// [columns]. Integers have codes in [least, most]; a table has 15 thresholds, and 16 values and codes in their order. What codes
// stand for is rounded to `dtype`. codes bytes, stored and errors float32 [columns, rows].
QCLI_KERNEL(gptq_columns)
(int64_t columns, int64_t rows, const float* w, const float* lower, const float* scale, const float* zero, const int32_t* groups,
 int form, float least, float most, const float* thresholds, const float* values, const float* codes_of_ranks, int dtype,
 uint8_t* codes, float* stored, float* errors, int threads) {
  const Grid grid = {least, most, thresholds, values, codes_of_ranks, dtype};
  const Block block = {columns, rows, w, lower, scale, zero, groups, grid, codes, stored, errors};
  QCLI_FORM(form, round_block, block, threads)
}
