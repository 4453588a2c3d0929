// Adds x times a sparse matrix to y: y[t, n] += sum over i in offsets[n] .. offsets[n + 1] of x[t, columns[i]] * values[i].
//
// The rows of the matrix are few elements each, so its values are read once for all tokens, and x stays in the cache.

#include "common.h"

namespace {

template <class V>
QCLI_INLINE float row_of(const float* x, const V* values, const int32_t* columns, int64_t begin, int64_t end) {
  float sums[4] = {};
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) {
    for (int j = 0; j < 4; j++) sums[j] += x[columns[i + j]] * to_float(values[i + j]);
  }
  for (; i < end; i++) sums[0] += x[columns[i]] * to_float(values[i]);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <class V, class T>
void add(T* y, const float* x, int64_t tokens, int64_t k, const V* values, const int32_t* columns, const int32_t* offsets, int64_t rows,
         int threads) {
  const int64_t per_row = offsets[rows] / larger<int64_t>(rows, 1) + 1;
  parallel(rows, larger<int64_t>(1, (1 << 14) / (per_row * tokens)), threads, [=](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; n++) {
      if (offsets[n] == offsets[n + 1]) continue;
      for (int64_t t = 0; t < tokens; t++) {
        T* const to = y + t * rows + n;
        from_float(to_float(*to) + row_of(x + t * k, values, columns, offsets[n], offsets[n + 1]), to);
      }
    }
  });
}

// The layout is that of the Record in qcli/ops/add_sparse.py.
struct Matrix {
  const void* values;      // [count], of value_dtype
  const int32_t* columns;  // [count]
  const int32_t* offsets;  // [rows + 1]
  int64_t rows, k, value_dtype;
};

template <class T>
void add_to(T* y, const float* x, int64_t tokens, const Matrix& m, int threads) {
  switch (m.value_dtype) {
    case kFloat32: add(y, x, tokens, m.k, static_cast<const float*>(m.values), m.columns, m.offsets, m.rows, threads); break;
    case kBFloat16: add(y, x, tokens, m.k, static_cast<const bf16*>(m.values), m.columns, m.offsets, m.rows, threads); break;
    default: add(y, x, tokens, m.k, static_cast<const f16*>(m.values), m.columns, m.offsets, m.rows, threads); break;
  }
}

template <class T>
void add_any(void* y, const void* x, int64_t tokens, const Matrix& m, int threads) {
  const T* from = static_cast<const T*>(x);
  const Scratch wide(4 * tokens * m.k);
  for (int64_t i = 0; i < tokens * m.k; i++) wide.as<float>()[i] = to_float(from[i]);
  add_to(static_cast<T*>(y), wide.as<float>(), tokens, m, threads);
}

struct Step {
  const float* x;  // [tokens, k]
  float* y;        // [tokens, rows]
  const void* matrix;
};

}  // namespace

// x [tokens, k] and y [tokens, rows] of `dtype`.
QCLI_KERNEL(add_sparse)(void* y, const void* x, int dtype, int64_t tokens, const void* matrix, int threads) {
  QCLI_DISPATCH(dtype, add_any, y, x, tokens, *static_cast<const Matrix*>(matrix), threads)
}

QCLI_STEP(add_sparse_step) {
  (void)start;
  const Step& a = *static_cast<const Step*>(record);
  add_to(a.y, a.x, tokens, *static_cast<const Matrix*>(a.matrix), threads);
}
