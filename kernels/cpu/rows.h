// The product of a few float32 tokens with the rows of a weight that is widened as it is read: int8, bfloat16, float16 or float32.
// It is bound by memory. A row that is no multiple of 16 is copied, with zeros behind it: no load reaches into the next one.
#pragma once

#include "chunks.h"

namespace {

constexpr int64_t kAhead = 1024;  // bytes; the hardware's own prefetching stops at page borders
constexpr int kPieces = 2;        // pieces of rows per thread; few, because each begins with streams that are not prefetched

// Tokens share widened weights, and rows share loaded x. Rows that are multiplied together are far apart, so memory fetches as many
// streams at once.
constexpr int kTokens = 4, kRows = 4;

using Floats = Float32<NaturalOrder>;

// totals += 16 columns at i of kR rows times kT tokens from t on.
template <int kT, int kR, class W>
QCLI_INLINE void add(const W* const* w, const Floats& x, int64_t t, int64_t i, F32x16 (*totals)[kT]) {
  for (int r = 0; r < kR; r++) {
    const F32x16 weights = load(w[r] + i);
    for (int s = 0; s < kT; s++) totals[r][s] = fused(weights, load(x.at(t + s, i)), totals[r][s]);
  }
}

// kR rows times kT tokens from t on: sums[r][s].
template <int kT, int kR, class W>
void products(const W* const* w, int64_t k, const Floats& x, int64_t t, float (*sums)[kTokens]) {
  F32x16 totals[kR][kT];
  for (int r = 0; r < kR; r++) {
    for (int s = 0; s < kT; s++) totals[r][s] = all(0.0f);
  }
  int64_t i = 0;
  for (; i + kChunk <= k; i += kChunk) {
    for (int r = 0; r < kR; r++) {
      const char* ahead = reinterpret_cast<const char*>(w[r] + i) + kAhead;
      for (int64_t j = 0; j < kChunk * int64_t(sizeof(W)); j += 64) __builtin_prefetch(ahead + j);
    }
    for (int j = 0; j < kChunk; j += 16) add<kT, kR>(w, x, t, i + j, totals);
  }
  for (; i < k; i += 16) add<kT, kR>(w, x, t, i, totals);
  for (int r = 0; r < kR; r++) {
    for (int s = 0; s < kT; s++) sums[r][s] = sum_lanes(totals[r][s]);
  }
}

template <int kT, class W>
void products(int count, const W* const* w, int64_t k, const Floats& x, int64_t t, float (*sums)[kTokens]) {
  if (count == 4 && kT <= 2) {
    products<kT, 4>(w, k, x, t, sums);
    return;
  }
  for (int r = 0; r < count; r += 2) (count - r > 1 ? products<kT, 2, W> : products<kT, 1, W>)(w + r, k, x, t, sums + r);
}

template <class W>
void products(int tokens, int count, const W* const* w, int64_t k, const Floats& x, int64_t t, float (*sums)[kTokens]) {
  switch (tokens) {
    case 1: products<1>(count, w, k, x, t, sums); break;
    case 2: products<2>(count, w, k, x, t, sums); break;
    case 3: products<3>(count, w, k, x, t, sums); break;
    default: products<kTokens>(count, w, k, x, t, sums); break;
  }
}

// y[t, n] = finish(n, sum_k x[t, k] w[n, k]) for x [tokens, k], w [out_features, k] and y [tokens, out_features].
template <class W, class T, class Finish>
void linear_of_rows(const T* input, int64_t tokens, const W* w, int64_t out_features, int64_t k, T* y, int threads, Finish finish) {
  const Floats x(input, tokens, k);
  const int64_t grain = divide_up(out_features, kPieces * larger(threads, 1));
  parallel(out_features, grain, threads, [=, &x](int64_t first, int64_t last) {
    const int64_t apart = divide_up(last - first, kRows), padded = k % 16 ? divide_up(k, 16) * 16 : 0;
    const Scratch copies(kRows * padded * int64_t(sizeof(W)));
    for (int64_t i = first; i < first + apart; i++) {
      const W* rows[kRows];
      int count = 0;
      for (int64_t n = i; n < last; n += apart, count++) {
        rows[count] = w + n * k;
        if (!padded) continue;
        W* copy = copies.as<W>() + count * padded;
        memset(static_cast<void*>(copy + k), 0, (padded - k) * sizeof(W));
        rows[count] = static_cast<const W*>(memcpy(static_cast<void*>(copy), rows[count], k * sizeof(W)));
      }
      for (int64_t t = 0; t < tokens; t += kTokens) {
        const int some = int(smaller<int64_t>(kTokens, tokens - t));
        float sums[kRows][kTokens];
        products(some, count, rows, k, x, t, sums);
        for (int r = 0; r < count; r++) {
          const int64_t n = i + r * apart;
          for (int s = 0; s < some; s++) from_float(finish(n, sums[r][s]), &y[(t + s) * out_features + n]);
        }
      }
    }
  });
}

}  // namespace
