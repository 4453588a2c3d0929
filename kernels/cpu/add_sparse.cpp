// Adds x times a sparse matrix to y; the definition is in qcli/ops/add_sparse.py.

#include "sparse.h"

namespace {

template <class T>
void add_any(void* y, const void* x, int64_t tokens, const Sparse& matrix, int threads) {
  add_product(static_cast<T*>(y), static_cast<const T*>(x), tokens, matrix, threads);
}

}  // namespace

// x [tokens, k] and y [tokens, rows] of `dtype`.
QCLI_KERNEL(add_sparse)(void* y, const void* x, int dtype, int64_t tokens, const void* matrix, int threads) {
  QCLI_DISPATCH(dtype, add_any, y, x, tokens, *static_cast<const Sparse*>(matrix), threads)
}
