// RMS norm or layer norm of a sum, for a few tokens.
//
//   sum = factor x + residual
//   y   = sum / sqrt(mean(sum^2) + eps) * weight + bias                        RMS
//   y   = (sum - mean(sum)) / sqrt(var(sum) + eps) * weight + bias             centered
//
// A token has `rows` rows of n values, each with a norm of its own: one row, or one per head. A thread takes whole rows; a few rows
// are left to the calling thread. Sums are float32, in 64 parts. Each value is read once from memory and again from L1.

#include "functions.h"

namespace {

struct Norm {
  const float* x;         // [tokens, rows, n], with x_stride floats between tokens
  const float* residual;  // [tokens, rows, n], or null
  const float* weight;    // [n], or null
  const float* bias;      // [n], or null
  float* sum;             // [tokens, rows, n], or null; may be the residual
  float* y;               // [tokens, rows, n] with y_stride floats between tokens, or null; may be x
  int64_t x_stride, y_stride, rows, n;
  float eps, factor;
  int centered;
};

constexpr int64_t kGrain = 32768;  // values

// The sum of term(i, count), the lanes at i with zeros beyond `count`, over all i below n.
template <class Term>
QCLI_INLINE float sum_of(int64_t n, Term term) {
  F32x16 sums[4];
  for (int k = 0; k < 4; k++) sums[k] = all(0.0f);
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    for (int k = 0; k < 4; k++) sums[k] = sums[k] + term(i + 16 * k, 16);
  }
  for (int k = 0; i < n; i += 16, k++) sums[k] = sums[k] + term(i, smaller(int64_t(16), n - i));
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

void norm_row(const Norm& a, const float* x, const float* residual, float* sum, float* y) {
  const int64_t n = a.n;
  if (residual || sum || a.factor != 1.0f) {
    float* to = sum ? sum : y;
    if (!to) return;
    const F32x16 factor = all(a.factor);
    for (int64_t i = 0; i < n; i += 16) {
      const int64_t count = smaller(int64_t(16), n - i);
      F32x16 value = load_some(x + i, count) * factor;
      if (residual) value = load_some(residual + i, count) + value;
      store_some(to + i, value, count);
    }
    x = to;
  }
  if (!y) return;
  float mean = 0.0f;
  if (a.centered) {
    mean = sum_of(n, [=](int64_t i, int64_t count) __attribute__((always_inline)) { return load_some(x + i, count); }) / float(n);
  }
  float means[16];
  store(means, all(mean));
  const float squares = sum_of(n, [=, &means](int64_t i, int64_t count) __attribute__((always_inline)) {
    const F32x16 value = load_some(x + i, count) - load_some(means, count);
    return value * value;
  });
  const F32x16 scale = all(1.0f / sqrtf(squares / float(n) + a.eps));
  for (int64_t i = 0; i < n; i += 16) {
    const int64_t count = smaller(int64_t(16), n - i);
    F32x16 value = (load_some(x + i, count) - all(mean)) * scale;
    if (a.weight) value = value * load_some(a.weight + i, count);
    if (a.bias) value = value + load_some(a.bias + i, count);
    store_some(y + i, value, count);
  }
}

}  // namespace

QCLI_STEP(norm) {
  (void)start;
  const Norm& a = *static_cast<const Norm*>(record);
  parallel(tokens * a.rows, larger(int64_t(1), kGrain / a.n), threads, [&a](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const int64_t token = row / a.rows, within = row % a.rows * a.n;
      norm_row(a, a.x + token * a.x_stride + within, a.residual ? a.residual + row * a.n : nullptr,
               a.sum ? a.sum + row * a.n : nullptr, a.y ? a.y + token * a.y_stride + within : nullptr);
    }
  });
}
