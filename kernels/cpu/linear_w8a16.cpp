// The product with an int8 weight for few tokens, with unquantized activations; the definition is in qcli/ops/linear_w8a16.py.
//
//   y[t, n] = sum_k x[t, k] q[n, k] * absmax[n] / 127  +  bias[n]
//
// Reads a byte per weight. x is not rounded: products and sums are float32. A row's last chunk may be partial: x is padded with
// zeros.

#include "chunks.h"

namespace {

constexpr int64_t kAhead = 1024;  // bytes; the hardware's own prefetching stops at page borders
constexpr int kPieces = 2;        // pieces of rows per thread; few, because each begins with streams that are not prefetched

// Tokens share widened weights, and rows share loaded x. Rows that are multiplied together are far apart, so memory fetches as many
// streams at once.
constexpr int kTokens = 4, kRows = 4;

// The layout is that of the Record in qcli/ops/linear_w8a16.py.
struct Weight {
  const int8_t* q;     // [out_features, k]
  const float* scale;  // [out_features]
  Bias bias;           // [out_features]
  int64_t out_features, k;
};

using Floats = Float32<NaturalOrder>;

// totals += the chunk at i of kR rows times kT tokens from t on.
template <int kT, int kR>
QCLI_INLINE void add(const int8_t* const* w, const Floats& x, int64_t t, int64_t i, F32x16 (*totals)[kT]) {
  for (int j = 0; j < kChunk; j += 16) {
    for (int r = 0; r < kR; r++) {
      const F32x16 weights = load(w[r] + i + j);
      for (int s = 0; s < kT; s++) totals[r][s] = fused(weights, load(x.at(t + s, i) + j), totals[r][s]);
    }
  }
}

// kR rows times kT tokens from t on: sums[r][s].
template <int kT, int kR>
void products(const int8_t* const* w, int64_t k, const Floats& x, int64_t t, float (*sums)[kTokens]) {
  F32x16 totals[kR][kT];
  for (int r = 0; r < kR; r++) {
    for (int s = 0; s < kT; s++) totals[r][s] = all(0.0f);
  }
  for (int64_t i = 0; i < k; i += kChunk) {
    for (int r = 0; r < kR; r++) {
      __builtin_prefetch(w[r] + i + kAhead);
      __builtin_prefetch(w[r] + i + kAhead + 64);
    }
    add<kT, kR>(w, x, t, i, totals);
  }
  for (int r = 0; r < kR; r++) {
    for (int s = 0; s < kT; s++) sums[r][s] = sum_lanes(totals[r][s]);
  }
}

template <int kT>
void products(int count, const int8_t* const* w, int64_t k, const Floats& x, int64_t t, float (*sums)[kTokens]) {
  if (count == 4 && kT <= 2) {
    products<kT, 4>(w, k, x, t, sums);
    return;
  }
  for (int r = 0; r < count; r += 2) (count - r > 1 ? products<kT, 2> : products<kT, 1>)(w + r, k, x, t, sums + r);
}

void products(int tokens, int count, const int8_t* const* w, int64_t k, const Floats& x, int64_t t, float (*sums)[kTokens]) {
  switch (tokens) {
    case 1: products<1>(count, w, k, x, t, sums); break;
    case 2: products<2>(count, w, k, x, t, sums); break;
    case 3: products<3>(count, w, k, x, t, sums); break;
    default: products<kTokens>(count, w, k, x, t, sums); break;
  }
}

template <class T>
void linear(const void* input, int64_t tokens, const Weight& w, void* output, int threads) {
  const Floats x(static_cast<const T*>(input), tokens, w.k);
  T* y = static_cast<T*>(output);
  const int64_t grain = divide_up(w.out_features, kPieces * larger(threads, 1));
  parallel(w.out_features, grain, threads, [=, &w, &x](int64_t first, int64_t last) {
    const int64_t apart = divide_up(last - first, kRows), padded = x.padded();
    const Scratch copies(kRows * padded);
    for (int64_t i = first; i < first + apart; i++) {
      const int8_t* rows[kRows];
      int count = 0;
      for (int64_t n = i; n < last; n += apart, count++) {
        rows[count] = w.q + n * w.k;
        if (n * w.k + padded <= w.out_features * w.k) continue;
        // The load of the last chunk must stay within the weight.
        int8_t* copy = copies.as<int8_t>() + count * padded;
        memset(copy + w.k, 0, padded - w.k);
        rows[count] = static_cast<const int8_t*>(memcpy(copy, rows[count], w.k));
      }
      for (int64_t t = 0; t < tokens; t += kTokens) {
        const int some = int(smaller<int64_t>(kTokens, tokens - t));
        float sums[kRows][kTokens];
        products(some, count, rows, w.k, x, t, sums);
        for (int r = 0; r < count; r++) {
          const int64_t n = i + r * apart;
          const float step = w.scale[n] * float(1.0 / 127), bias = w.bias.at(n);
          for (int s = 0; s < some; s++) from_float(sums[r][s] * step + bias, &y[(t + s) * w.out_features + n]);
        }
      }
    }
  });
}

}  // namespace

// x [tokens, k] and y [tokens, out_features] of `dtype`.
QCLI_KERNEL(linear_w8a16)(const void* x, int dtype, int64_t tokens, const void* weight, void* y, int threads) {
  QCLI_DISPATCH(dtype, linear, x, tokens, *static_cast<const Weight*>(weight), y, threads)
}
