// The product with an unquantized weight for few tokens: of a language model's head, and of modules that a recipe leaves alone.
//
//   y[t, n] = sum_k x[t, k] w[n, k]  +  bias[n]
//
// Reads a weight once, in its own dtype. Products and sums are float32.

#include "rows.h"

namespace {

// The layout is that of the Record in qcli/ops/linear_float.py.
struct Weight {
  const void* w;  // [out_features, k]
  int64_t dtype;
  Bias bias;  // [out_features]
  int64_t out_features, k;
};

template <class W, class T>
void linear_of(const T* x, int64_t tokens, const Weight& w, T* y, int threads) {
  const auto finish = [&w](int64_t n, float sum) { return sum + w.bias.at(n); };
  linear_of_rows(x, tokens, static_cast<const W*>(w.w), w.out_features, w.k, y, threads, finish);
}

template <class T>
void linear(const void* input, int64_t tokens, const Weight& w, void* output, int threads) {
  const T* x = static_cast<const T*>(input);
  T* y = static_cast<T*>(output);
  switch (w.dtype) {
    case kFloat32: linear_of<float>(x, tokens, w, y, threads); break;
    case kBFloat16: linear_of<bf16>(x, tokens, w, y, threads); break;
    case kFloat16: linear_of<f16>(x, tokens, w, y, threads); break;
  }
}

}  // namespace

// x [tokens, k] and y [tokens, out_features] of `dtype`.
QCLI_KERNEL(linear_float)(const void* x, int dtype, int64_t tokens, const void* weight, void* y, int threads) {
  QCLI_DISPATCH(dtype, linear, x, tokens, *static_cast<const Weight*>(weight), y, threads)
}

QCLI_LINEAR_STEP(linear_float_step, linear<float>)
