// Products of some rows of a weight of table_rows.h with some tokens, for linear_table: float32, or of 16-bit integers (chunks.h).
#pragma once

#include "table_rows.h"

namespace {

constexpr int64_t kAhead = 1024;  // bytes

// Tokens share decoded weights. Rows that are multiplied together are far apart, so memory fetches as many streams at once.
constexpr int kTokens = 4, kRows = 4;

template <int kBits, Scaling kScaling, int kT, int kR>
void products(const Given<Floats>& given, const Row* rows, int64_t t, float (*sums)[kTokens]) {
  const Floats& x = given.x;
  F32x16 totals[kR][kT];
  for (int r = 0; r < kR; r++) {
    for (int s = 0; s < kT; s++) totals[r][s] = all(0.0f);
  }
  for (int64_t i = 0; i < given.w.k; i += kChunk) {
    for (int r = 0; r < kR; r++) {
      const uint8_t* p = rows[r].packed + i / kUnit * unit_bytes(kBits);
      __builtin_prefetch(p + kAhead);
      const I32x16 chunk = nibbles<kBits>(p);
      const Table16 table = table16(rows[r].entries);
      F32x16 some[2][kT];  // of the first halves of units, and of the second ones
      const auto step = [&](int j, F32x16 weights) __attribute__((always_inline)) {
        for (int s = 0; s < kT; s++) {
          const F32x16 values = load(x.at(t + s, i) + 16 * j);
          some[j % 2][s] = j < 2 ? weights * values : fused(weights, values, some[j % 2][s]);
        }
      };
      step(0, look_up<0>(table, chunk));
      step(1, look_up<4>(table, chunk));
      step(2, look_up<8>(table, chunk));
      step(3, look_up<12>(table, chunk));
      step(4, look_up<16>(table, chunk));
      step(5, look_up<20>(table, chunk));
      step(6, look_up<24>(table, chunk));
      step(7, look_up<28>(table, chunk));
      if (kScaling == Scaling::kRow) {
        for (int s = 0; s < kT; s++) totals[r][s] = totals[r][s] + (some[0][s] + some[1][s]);
        continue;
      }
      const int32_t* group = given.groups + i / 32;
      for (int half = 0; half < 2; half++) {
        const F32x16 scales = halves(rows[r].scale(group[half]), rows[r].scale(group[2 + half]));
        for (int s = 0; s < kT; s++) totals[r][s] = fused(some[half][s], scales, totals[r][s]);
      }
    }
  }
  for (int r = 0; r < kR; r++) {
    for (int s = 0; s < kT; s++) sums[r][s] = sum_lanes(totals[r][s]) * (kScaling == Scaling::kRow ? rows[r].scale(0) : 1.0f);
  }
}

#if defined(QCLI_INT16_PRODUCTS)
// The scales of a register of codes at i: of the first or the second halves of its units.
QCLI_INLINE Lanes of_lanes(const Row& row, const int32_t* group) {
#if defined(__AVX512F__)
  return {halves(row.scale(group[0]), row.scale(group[2])).v};
#else
  return lanes_of(row.scale(group[0]));
#endif
}

// The product of a row with token t, from the sum of its integers' products.
template <int kBits, Scaling kScaling, class X>
QCLI_INLINE float finished(const Given<X>& given, const Row& row, float sum, int64_t t) {
  sum *= row.unit * (kScaling == Scaling::kRow ? row.scale(0) : 1.0f);
  for (int64_t o = 0; o < given.x.outliers(t); o++) {
    const Outlier each = given.x.outlier(t, o);
    sum += each.value * row.entries[code_at<kBits>(row.packed, each.i)] * row.scale(given.groups[each.i / 32]);
  }
  return sum;
}

template <int kBits, Scaling kScaling, int kT, int kR>
void products(const Given<Ints>& given, const Row* all_rows, int64_t t, float (*sums)[kTokens]) {
  const Ints& x = given.x;
  const int64_t k = given.w.k;
  Row rows[kR];
  const int16_t* values[kT];
  const float* steps[kT];
  Lanes totals[kR][kT];
  for (int r = 0; r < kR; r++) rows[r] = all_rows[r];
  for (int s = 0; s < kT; s++) {
    values[s] = x.at(t + s, 0);
    steps[s] = x.steps(t + s);
  }
  for (int r = 0; r < kR; r++) {
    for (int s = 0; s < kT; s++) totals[r][s] = no_lanes();
  }
  for (int64_t i = 0; i < k; i += kWide) {
    for (int r = 0; r < kR; r++) {
      const uint8_t* p = rows[r].packed + i / kUnit * unit_bytes(kBits);
      __builtin_prefetch(p + kAhead);
      const Packed packed = packed_nibbles<kBits>(p);
      const int32_t* group = given.groups + i / 32;
      Words weights[2];
      Sums some[kT];
      look_up_half<0>(rows[r].codes, packed, weights);
      for (int s = 0; s < kT; s++) {
        some[s] = add_dot(dot(weights[0], load_words(values[s] + i)), weights[1], load_words(values[s] + i + kWide / 2));
        if (kScaling != Scaling::kHalves) continue;
        totals[r][s] = add_scaled(totals[r][s], some[s], times(of_lanes(rows[r], group), steps[s][i / kWide]));
      }
      look_up_half<1>(rows[r].codes, packed, weights);
      for (int s = 0; s < kT; s++) {
        const int16_t* from = values[s] + i + kWide / 4;
        some[s] = kScaling == Scaling::kHalves ? dot(weights[0], load_words(from)) : add_dot(some[s], weights[0], load_words(from));
        some[s] = add_dot(some[s], weights[1], load_words(from + kWide / 2));
        const float step = steps[s][i / kWide];
        const Lanes scale = kScaling == Scaling::kRow ? lanes_of(step) : times(of_lanes(rows[r], group + 1), step);
        totals[r][s] = add_scaled(totals[r][s], some[s], scale);
      }
    }
  }
  for (int r = 0; r < kR; r++) {
    for (int s = 0; s < kT; s++) sums[r][s] = finished<kBits, kScaling>(given, rows[r], sum_lanes(totals[r][s]), t + s);
  }
}

#if defined(__AVX512F__)
// The scales of four units at i: of their first or their second halves. Up to `simple`, each unit has its own.
QCLI_INLINE Lanes of_four(const Given<FourInts>& given, const Row& row, int64_t i, int half, int64_t simple) {
  if (i < simple) {
    const __m512i fourth = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    return {_mm512_permutexvar_ps(fourth, _mm512_castps128_ps512(_mm_loadu_ps(row.absmax + i / kUnit)))};
  }
  const int32_t* group = given.groups + i / 32 + half;
  return lanes_of(row.scale(group[0]), row.scale(group[2]), row.scale(group[4]), row.scale(group[6]));
}

template <int kBits, Scaling kScaling, int kT, int kR>
void products(const Given<FourInts>& given, const Row* rows, int64_t t, float (*sums)[kTokens]) {
  const FourInts& x = given.x;
  const int64_t k = given.w.k, simple = given.w.block_size == kUnit && given.w.absmax ? k / kFour * kFour : 0;
  const int16_t* values[kT];
  const float* steps[kT];
  Lanes totals[kR][kT];
  for (int s = 0; s < kT; s++) {
    values[s] = x.at(t + s, 0);
    steps[s] = x.steps(t + s);
  }
  for (int r = 0; r < kR; r++) {
    for (int s = 0; s < kT; s++) totals[r][s] = no_lanes();
  }
  for (int64_t i = 0; i < k; i += kFour) {
    for (int r = 0; r < kR; r++) {
      const uint8_t* p = rows[r].packed + i / kUnit * unit_bytes(kBits);
      __builtin_prefetch(p + kAhead);
      Sums some[kT];
      look_up_four<kBits>(p, rows[r].four, [&](int vector, Words weights) __attribute__((always_inline)) {
        const bool first = vector == 0 || (kScaling == Scaling::kHalves && vector == 4);
        const bool last = vector == 7 || (kScaling == Scaling::kHalves && vector == 3);
        for (int s = 0; s < kT; s++) {
          const Words of_x = load_words(values[s] + i + 32 * vector);
          some[s] = first ? dot(weights, of_x) : add_dot(some[s], weights, of_x);
          if (!last) continue;
          const float step = steps[s][i / kFour];
          const Lanes scale = kScaling == Scaling::kRow ? lanes_of(step) : times(of_four(given, rows[r], i, vector / 4, simple), step);
          totals[r][s] = add_scaled(totals[r][s], some[s], scale);
        }
      });
    }
  }
  for (int r = 0; r < kR; r++) {
    for (int s = 0; s < kT; s++) sums[r][s] = finished<kBits, kScaling>(given, rows[r], sum_lanes(totals[r][s]), t + s);
  }
}
#endif
#endif

template <int kBits, Scaling kScaling, int kT, class X>
void products(int count, const Given<X>& given, const Row* rows, int64_t t, float (*sums)[kTokens]) {
  if (kT == 1 && count == kRows) {
    products<kBits, kScaling, kT, kRows>(given, rows, t, sums);
    return;
  }
  for (int r = 0; r < count; r += 2) {
    if (count - r > 1) {
      products<kBits, kScaling, kT, 2>(given, rows + r, t, sums + r);
    } else {
      products<kBits, kScaling, kT, 1>(given, rows + r, t, sums + r);
    }
  }
}

}  // namespace
