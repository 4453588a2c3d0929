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

// Rows, and the scales of each one's groups.
template <class W>
struct Grouped {
  const W* const* rows;
  const float* const* scales;
  int64_t group;  // a multiple of 16
};

// kR rows times kT tokens from t on: sums[r][s]. The sum of each group is scaled once.
template <int kT, int kR, class W>
void products(const Grouped<W>& w, int64_t k, const Floats& x, int64_t t, float (*sums)[kTokens]) {
  F32x16 totals[kR][kT];
  for (int r = 0; r < kR; r++) {
    for (int s = 0; s < kT; s++) totals[r][s] = all(0.0f);
  }
  for (int64_t i = 0, g = 0; i < k; g++) {
    F32x16 some[kR][kT];
    for (int r = 0; r < kR; r++) {
      const char* ahead = reinterpret_cast<const char*>(w.rows[r] + i) + kAhead;
      for (int64_t j = 0; j < w.group * int64_t(sizeof(W)); j += 64) __builtin_prefetch(ahead + j);
      for (int s = 0; s < kT; s++) some[r][s] = all(0.0f);
    }
    for (const int64_t end = smaller(k, i + w.group); i < end; i += 16) add<kT, kR>(w.rows, x, t, i, some);
    for (int r = 0; r < kR; r++) {
      const F32x16 scale = all(w.scales[r][g]);
      for (int s = 0; s < kT; s++) totals[r][s] = fused(some[r][s], scale, totals[r][s]);
    }
  }
  for (int r = 0; r < kR; r++) {
    for (int s = 0; s < kT; s++) sums[r][s] = sum_lanes(totals[r][s]);
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

template <class W>
QCLI_INLINE const W* const* from_row(const W* const* w, int r) {
  return w + r;
}
template <class W>
QCLI_INLINE Grouped<W> from_row(const Grouped<W>& w, int r) {
  return {w.rows + r, w.scales + r, w.group};
}

template <int kT, class Rows>
void products(int count, const Rows& w, int64_t k, const Floats& x, int64_t t, float (*sums)[kTokens]) {
  if (count == 4 && kT <= 2) {
    products<kT, 4>(w, k, x, t, sums);
    return;
  }
  for (int r = 0; r < count; r += 2) {
    if (count - r > 1) {
      products<kT, 2>(from_row(w, r), k, x, t, sums + r);
    } else {
      products<kT, 1>(from_row(w, r), k, x, t, sums + r);
    }
  }
}

template <class Rows>
void products(int tokens, int count, const Rows& w, int64_t k, const Floats& x, int64_t t, float (*sums)[kTokens]) {
  switch (tokens) {
    case 1: products<1>(count, w, k, x, t, sums); break;
    case 2: products<2>(count, w, k, x, t, sums); break;
    case 3: products<3>(count, w, k, x, t, sums); break;
    default: products<kTokens>(count, w, k, x, t, sums); break;
  }
}

// For w [out_features, k], calls multiply(rows, numbers, count, tokens, t, sums), which fills sums[r][s] for tokens from t on, and puts
// finish(n, t, sum) into y [tokens, out_features]. x [tokens, k].
template <class W, class T, class Multiply, class Finish>
void linear_by(const T* input, int64_t tokens, const W* w, int64_t out_features, int64_t k, T* y, int threads, Multiply multiply,
               Finish finish) {
  const Floats x(input, tokens, k);
  const int64_t grain = divide_up(out_features, kPieces * larger(threads, 1));
  parallel(out_features, grain, threads, [=, &x](int64_t first, int64_t last) {
    const int64_t apart = divide_up(last - first, kRows), padded = k % 16 ? divide_up(k, 16) * 16 : 0;
    const Scratch copies(kRows * padded * int64_t(sizeof(W)));
    for (int64_t i = first; i < first + apart; i++) {
      const W* rows[kRows];
      int64_t numbers[kRows];
      int count = 0;
      for (int64_t n = i; n < last; n += apart, count++) {
        rows[count] = w + n * k;
        numbers[count] = n;
        if (!padded) continue;
        W* copy = copies.as<W>() + count * padded;
        memset(static_cast<void*>(copy + k), 0, (padded - k) * sizeof(W));
        rows[count] = static_cast<const W*>(memcpy(static_cast<void*>(copy), rows[count], k * sizeof(W)));
      }
      for (int64_t t = 0; t < tokens; t += kTokens) {
        const int some = int(smaller<int64_t>(kTokens, tokens - t));
        float sums[kRows][kTokens];
        multiply(rows, numbers, count, some, x, t, sums);
        for (int r = 0; r < count; r++) {
          const int64_t n = numbers[r];
          for (int s = 0; s < some; s++) from_float(finish(n, t + s, sums[r][s]), &y[(t + s) * out_features + n]);
        }
      }
    }
  });
}

// y[t, n] = finish(n, sum_k x[t, k] w[n, k]) for x [tokens, k], w [out_features, k] and y [tokens, out_features].
template <class W, class T, class Finish>
void linear_of_rows(const T* x, int64_t tokens, const W* w, int64_t out_features, int64_t k, T* y, int threads, Finish finish) {
  const auto multiply = [k](const W* const* rows, const int64_t*, int count, int some, const Floats& laid_out, int64_t t,
                            float (*sums)[kTokens]) { products(some, count, rows, k, laid_out, t, sums); };
  linear_by(x, tokens, w, out_features, k, y, threads, multiply, [=](int64_t n, int64_t, float sum) { return finish(n, sum); });
}

// y[t, n] = finish(n, t, sum_k x[t, k] w[n, k] scale[n, k / group]) likewise, for a group that is a multiple of 16.
template <class W, class T, class Finish>
void linear_of_groups(const T* x, int64_t tokens, const W* w, const float* scale, int64_t group, int64_t out_features, int64_t k, T* y,
                      int threads, Finish finish) {
  const int64_t groups = divide_up(k, group);
  const auto multiply = [=](const W* const* rows, const int64_t* numbers, int count, int some, const Floats& laid_out, int64_t t,
                            float (*sums)[kTokens]) {
    const float* scales[kRows];
    for (int r = 0; r < count; r++) scales[r] = scale + numbers[r] * groups;
    products(some, count, Grouped<W>{rows, scales, group}, k, laid_out, t, sums);
  };
  linear_by(x, tokens, w, out_features, k, y, threads, multiply, finish);
}

}  // namespace
