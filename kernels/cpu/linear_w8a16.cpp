// The product with an 8-bit weight for few tokens, with unquantized activations; the definition is in qcli/ops/linear_w8a16.py.
//
//   y[t, n] = sum_k x[t, k] (q[n, k] - zero[n, g]) * scale[n, g] * unit  +  bias[n],   g = k / group
//
// q is int8 or E4M3. Reads a byte per weight. x is not rounded: products and sums are float32. A row whose elements share one scale is
// summed whole.

#include "rows.h"

namespace {

// The layout is that of the Record in qcli/ops/linear_w8a16.py.
struct Weight {
  const void* q;       // [out_features, k]
  const float* scale;  // [out_features, groups]
  const int8_t* zero;  // likewise, or null
  Bias bias;           // [out_features]
  int64_t out_features, k, group;
  int32_t is_float;
  float unit;
};

template <class W, class T>
void rows(const T* x, int64_t tokens, const Weight& w, T* y, int threads) {
  const auto finish = [&w](int64_t n, float sum) { return sum * (w.scale[n] * w.unit) + w.bias.at(n); };
  linear_of_rows(x, tokens, static_cast<const W*>(w.q), w.out_features, w.k, y, threads, finish);
}

// The sums of x over each group.
template <class T>
void sum_groups(const T* x, int64_t tokens, int64_t k, int64_t group, float* to) {
  for (int64_t t = 0; t < tokens; t++, x += k) {
    for (int64_t i = 0; i < k; i += group) {
      float sum = 0.0f;
      for (int64_t j = i; j < smaller(k, i + group); j++) sum += to_float(x[j]);
      *to++ = sum;
    }
  }
}

template <class W, class T>
void groups(const T* x, int64_t tokens, const Weight& w, T* y, int threads) {
  const int64_t count = divide_up(w.k, w.group);
  const Scratch sums(w.zero ? 4 * tokens * count : 0);
  if (w.zero) sum_groups(x, tokens, w.k, w.group, sums.as<float>());
  const float* of_groups = sums.as<float>();
  const auto finish = [=, &w](int64_t n, int64_t t, float sum) {
    if (w.zero) {
      float less = 0.0f;
      const int8_t* zero = w.zero + n * count;
      for (int64_t g = 0; g < count; g++) less += float(zero[g]) * w.scale[n * count + g] * of_groups[t * count + g];
      sum -= less;
    }
    return sum * w.unit + w.bias.at(n);
  };
  linear_of_groups(x, tokens, static_cast<const W*>(w.q), w.scale, w.group, w.out_features, w.k, y, threads, finish);
}

template <class T>
void linear(const void* input, int64_t tokens, const Weight& w, void* output, int threads) {
  const T* x = static_cast<const T*>(input);
  T* y = static_cast<T*>(output);
  if (w.group) {
    w.is_float ? groups<e4m3>(x, tokens, w, y, threads) : groups<int8_t>(x, tokens, w, y, threads);
  } else {
    w.is_float ? rows<e4m3>(x, tokens, w, y, threads) : rows<int8_t>(x, tokens, w, y, threads);
  }
}

}  // namespace

// x [tokens, k] and y [tokens, out_features] of `dtype`.
QCLI_KERNEL(linear_w8a16)(const void* x, int dtype, int64_t tokens, const void* weight, void* y, int threads) {
  QCLI_DISPATCH(dtype, linear, x, tokens, *static_cast<const Weight*>(weight), y, threads)
}

QCLI_LINEAR_STEP(linear_w8a16_step, linear<float>)
