// Products of some rows of a 4-bit weight with some tokens, for linear_4bit: float32, or of 16-bit integers (chunks.h).
#pragma once

#include "integers_4bit.h"

namespace {

// The hardware's own prefetching stops at page borders and is slower than the arithmetic.
QCLI_INLINE I32x16 load_chunk(const uint8_t* p) {
  __builtin_prefetch(p + kAhead);
  return load_ints(p);
}

using Floats = Float32<NibbleOrder>;

template <int j, int kT, int kR>
QCLI_INLINE void add_step(Table16 table, const I32x16* chunk, const float* const* x, F32x16 (*sums)[kT]) {
  for (int r = 0; r < kR; r++) {
    const F32x16 weights = look_up<4 * j>(table, chunk[r]);
    for (int s = 0; s < kT; s++) {
      const F32x16 values = load(x[s] + 16 * j);
      sums[r][s] = j ? fused(weights, values, sums[r][s]) : weights * values;
    }
  }
}

// totals += chunk * scales, for the chunk at i of kR rows and kT tokens from t on.
template <int kT, int kR>
QCLI_INLINE void add(Table16 table, const I32x16* chunk, const Floats& x, int64_t t, int64_t i, const F32x16* scales,
                     F32x16 (*totals)[kT]) {
  const float* values[kT];
  for (int s = 0; s < kT; s++) values[s] = x.at(t + s, i);
  F32x16 sums[kR][kT];
  add_step<0, kT, kR>(table, chunk, values, sums);
  add_step<1, kT, kR>(table, chunk, values, sums);
  add_step<2, kT, kR>(table, chunk, values, sums);
  add_step<3, kT, kR>(table, chunk, values, sums);
  add_step<4, kT, kR>(table, chunk, values, sums);
  add_step<5, kT, kR>(table, chunk, values, sums);
  add_step<6, kT, kR>(table, chunk, values, sums);
  add_step<7, kT, kR>(table, chunk, values, sums);
  for (int r = 0; r < kR; r++) {
    for (int s = 0; s < kT; s++) totals[r][s] = fused(sums[r][s], scales[r], totals[r][s]);
  }
}

// The chunk at i of kR rows times kT tokens from t on.
template <int kT, int kR, Scaling kScaling, bool kWhole>
QCLI_INLINE void add_chunk(const Weight& w, const Row* rows, Table16 table, const Floats& x, int64_t t, int64_t i, F32x16 (*totals)[kT]) {
  I32x16 chunk[kR];
  F32x16 scales[kR];
  for (int r = 0; r < kR; r++) {
    chunk[r] = load_chunk(rows[r].packed + i / 2);
    scales[r] = rows[r].of_chunk<kScaling, kWhole>(w, rows[r].scales, i);
  }
  add<kT, kR>(table, chunk, x, t, i, scales, totals);
  if (!w.zero) return;
  for (int r = 0; r < kR; r++) {
    const F32x16 offsets = rows[r].of_chunk<kScaling, kWhole>(w, rows[r].offsets, i);
    for (int s = 0; s < kT; s++) totals[r][s] = fused(load(x.sums(t + s, i)), offsets, totals[r][s]);
  }
}

// kR rows times kT tokens from t on: sums[r][s].
template <int kT, int kR, Scaling kScaling>
void products(const Weight& w, const Row* rows, const Floats& x, int64_t t, float (*sums)[kTokens]) {
  const Table16 table = table16(w.code);
  F32x16 totals[kR][kT];
  for (int r = 0; r < kR; r++) {
    for (int s = 0; s < kT; s++) totals[r][s] = all(0.0f);
  }
  int64_t i = 0;
  for (; i + kChunk <= w.k; i += kChunk) add_chunk<kT, kR, kScaling, true>(w, rows, table, x, t, i, totals);
  if (i < w.k) add_chunk<kT, kR, kScaling, false>(w, rows, table, x, t, i, totals);
  for (int r = 0; r < kR; r++) {
    for (int s = 0; s < kT; s++) sums[r][s] = sum_lanes(totals[r][s]);
  }
}

template <int kT, Scaling kScaling, class X>
void products(int count, const Weight& w, const Row* rows, const X& x, int64_t t, float (*sums)[kTokens]) {
  if (count == 4 && kT <= 2) {
    products<kT, 4, kScaling>(w, rows, x, t, sums);
    return;
  }
  for (int r = 0; r < count; r += 2) {
    if (count - r > 1) {
      products<kT, 2, kScaling>(w, rows + r, x, t, sums + r);
    } else {
      products<kT, 1, kScaling>(w, rows + r, x, t, sums + r);
    }
  }
}

template <Scaling kScaling, class X>
void products(int tokens, int count, const Weight& w, const Row* rows, const X& x, int64_t t, float (*sums)[kTokens]) {
  switch (tokens) {
    case 1: products<1, kScaling>(count, w, rows, x, t, sums); break;
    case 2: products<2, kScaling>(count, w, rows, x, t, sums); break;
    case 3: products<3, kScaling>(count, w, rows, x, t, sums); break;
    default: products<kTokens, kScaling>(count, w, rows, x, t, sums); break;
  }
}

}  // namespace
