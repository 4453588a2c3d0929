// Products of some rows of a 4-bit weight with some tokens in 16-bit integers (chunks.h).
#pragma once

#include "blocks_4bit.h"

#if defined(QCLI_INT16_PRODUCTS)

namespace {

constexpr int kSameStep = 1024;  // elements of x; more steps are no finer where outliers are apart, and cost a product each

// x, and the table of codes.
class Int16 : public Integers<NibbleOrder, kWide, kSameStep> {
 public:
  template <class T>
  Int16(const T* x, int64_t rows, const Weight& w)
      : Integers(x, rows, w.k, w.zero != nullptr), codes_(codes_of(w.code, kCodeSteps)) {}
  const Codes16& codes() const { return codes_; }

 private:
  Codes16 codes_;
};

// What outliers of x add to the product of a row.
template <Scaling kScaling>
float outliers_of(const Weight& w, const Row& row, const Int16& x, int64_t t) {
  float sum = 0.0f;
  for (int64_t o = 0; o < x.outliers(t); o++) {
    const Outlier each = x.outlier(t, o);
    const int code = row.packed[each.i / 2] >> (each.i % 2 ? 0 : 4) & 15;
    sum += each.value * w.code[code] * row.scales[row.template block_of<kScaling>(each.i)];
    if (w.zero) sum += each.value * row.offsets[row.template block_of<kScaling>(each.i)];
  }
  return sum;
}

// The scales, or the offsets, of kWide elements at i. Those beyond the row's end are zero: what is read there is another row's.
template <Scaling kScaling, bool kWhole>
QCLI_INLINE Lanes of_lanes(const Weight& w, const Row& row, const float* values, int64_t i) {
#if defined(__AVX512F__)
  return {row.of_chunk<kScaling, kWhole>(w, values, i).v};
#else
  float q[kWide / 32];
  for (int j = 0; j < kWide / 32; j++) {
    q[j] = kWhole || i + 32 * j < w.k ? values[row.block_of<kScaling>(i + 32 * j)] : 0.0f;
  }
  return kWhole && kScaling != Scaling::kQuarters ? lanes_of(q[0]) : lanes_of(q[0], q[1]);
#endif
}

// Where a token's integers and steps are.
struct Token {
  const int16_t* values;
  const float* steps;
  const float* sums;  // of eight elements each, if there are zero points
};

// One register of codes of kR rows at i.
template <int kT, int kR, Scaling kScaling, bool kZero, bool kWhole>
QCLI_INLINE void add_wide(const Weight& w, const Row* rows, const Token (&tokens)[kT], const Codes16& codes, int64_t i,
                          Lanes (&totals)[kR][kT]) {
  for (int r = 0; r < kR; r++) {
    const uint8_t* p = rows[r].packed + i / 2;
    __builtin_prefetch(p + kAhead);
    const Packed packed = load_packed(p);
    Words weights[2];
    Sums sums[kT];
    look_up_half<0>(codes, packed, weights);
    for (int s = 0; s < kT; s++) {
      const int16_t* values = tokens[s].values + i;
      sums[s] = add_dot(dot(weights[0], load_words(values)), weights[1], load_words(values + kWide / 2));
    }
    look_up_half<1>(codes, packed, weights);
    const Lanes scales = of_lanes<kScaling, kWhole>(w, rows[r], rows[r].scales, i);
    for (int s = 0; s < kT; s++) {
      const int16_t* values = tokens[s].values + i + kWide / 4;
      sums[s] = add_dot(add_dot(sums[s], weights[0], load_words(values)), weights[1], load_words(values + kWide / 2));
      totals[r][s] = add_scaled(totals[r][s], sums[s], scales);
    }
    if (!kZero) continue;
    const Lanes offsets = of_lanes<kScaling, kWhole>(w, rows[r], rows[r].offsets, i);
    for (int s = 0; s < kT; s++) totals[r][s] = add_product(totals[r][s], load_lanes(tokens[s].sums + i / 8), offsets);
  }
}

template <int kT, int kR, Scaling kScaling, bool kZero>
void integer_products(const Weight& w, const Row* rows, const Int16& x, int64_t t, float (*sums)[kTokens]) {
  const Codes16 codes = x.codes();
  Token tokens[kT];
  Lanes totals[kR][kT];
  for (int s = 0; s < kT; s++) tokens[s] = {x.at(t + s, 0), x.steps(t + s), x.sums(t + s)};
  for (int r = 0; r < kR; r++) {
    for (int s = 0; s < kT; s++) totals[r][s] = no_lanes();
  }
  for (int64_t i = 0; i < w.k;) {
    Lanes some[kR][kT];  // in steps of x
    for (int r = 0; r < kR; r++) {
      for (int s = 0; s < kT; s++) some[r][s] = no_lanes();
    }
    const int64_t step = i / kSameStep, end = smaller(w.k, i + kSameStep);
    for (; i + kWide <= end; i += kWide) add_wide<kT, kR, kScaling, kZero, true>(w, rows, tokens, codes, i, some);
    if (i < end) {
      add_wide<kT, kR, kScaling, kZero, false>(w, rows, tokens, codes, i, some);
      i = end;
    }
    for (int r = 0; r < kR; r++) {
      for (int s = 0; s < kT; s++) totals[r][s] = add_product(totals[r][s], some[r][s], lanes_of(tokens[s].steps[step]));
    }
  }
  for (int r = 0; r < kR; r++) {
    for (int s = 0; s < kT; s++) sums[r][s] = sum_lanes(totals[r][s]);
  }
  for (int s = 0; s < kT; s++) {
    if (!x.outliers(t + s)) continue;
    for (int r = 0; r < kR; r++) sums[r][s] += outliers_of<kScaling>(w, rows[r], x, t + s);
  }
}

template <int kT, int kR, Scaling kScaling>
void products(const Weight& w, const Row* rows, const Int16& x, int64_t t, float (*sums)[kTokens]) {
  if (w.zero) {
    integer_products<kT, kR, kScaling, true>(w, rows, x, t, sums);
  } else {
    integer_products<kT, kR, kScaling, false>(w, rows, x, t, sums);
  }
}

}  // namespace

#endif
