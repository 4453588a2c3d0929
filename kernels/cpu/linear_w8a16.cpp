// The product with an int8 weight for few tokens, with unquantized activations; the definition is in qcli/ops/linear_w8a16.py.
//
//   y[t, n] = sum_k x[t, k] q[n, k] * absmax[n] / 127  +  bias[n]
//
// Reads a byte per weight. x is not rounded: products and sums are float32.

#include "rows.h"

namespace {

// The layout is that of the Record in qcli/ops/linear_w8a16.py.
struct Weight {
  const int8_t* q;     // [out_features, k]
  const float* scale;  // [out_features]
  Bias bias;           // [out_features]
  int64_t out_features, k;
};

template <class T>
void linear(const void* x, int64_t tokens, const Weight& w, void* y, int threads) {
  const auto finish = [&w](int64_t n, float sum) { return sum * (w.scale[n] * float(1.0 / 127)) + w.bias.at(n); };
  linear_of_rows(static_cast<const T*>(x), tokens, w.q, w.out_features, w.k, static_cast<T*>(y), threads, finish);
}

}  // namespace

// x [tokens, k] and y [tokens, out_features] of `dtype`.
QCLI_KERNEL(linear_w8a16)(const void* x, int dtype, int64_t tokens, const void* weight, void* y, int threads) {
  QCLI_DISPATCH(dtype, linear, x, tokens, *static_cast<const Weight*>(weight), y, threads)
}

QCLI_LINEAR_STEP(linear_w8a16_step, linear<float>)
