// linear_4bit for many tokens: rows are decoded to 16-bit integers once, and multiplied with kManyTokens tokens at a time. Tokens go
// by blocks that L2 holds.
#pragma once

#include "products_4bit.h"

#if defined(QCLI_INT16_PRODUCTS)

namespace {

constexpr int kManyRows = 4, kManyTokens = 3;
constexpr int64_t kFewTokens = 12;       // up to here decoding for every four tokens is as fast
constexpr int64_t kTokenBytes = 256000;  // of a block of tokens

// A row in the order of x, and the scales of each kWide of its elements.
template <Scaling kScaling>
void decode_row(const Weight& w, const Row& row, const Codes16& codes, int16_t* to, Lanes* scales) {
  for (int64_t i = 0; i < w.k; i += kWide, to += kWide) {
    const uint8_t* p = row.packed + i / 2;
    __builtin_prefetch(p + kAhead);
    const Packed packed = load_packed(p);
    Words weights[2];
    look_up_half<0>(codes, packed, weights);
    store_words(to, weights[0]);
    store_words(to + kWide / 2, weights[1]);
    look_up_half<1>(codes, packed, weights);
    store_words(to + kWide / 4, weights[0]);
    store_words(to + kWide * 3 / 4, weights[1]);
    *scales++ = i + kWide <= w.k ? of_lanes<kScaling, true>(w, row, row.scales, i) : of_lanes<kScaling, false>(w, row, row.scales, i);
  }
}

// What outliers of x add to the product of a row, whose scales are in lanes.
float outliers_of_decoded(const Weight& w, const uint8_t* packed, const Lanes* scales, const Int16& x, int64_t t) {
  const float* lanes = reinterpret_cast<const float*>(scales);  // kWide / 8 per register, four for every 32 elements
  float sum = 0.0f;
  for (int64_t o = 0; o < x.outliers(t); o++) {
    const Outlier each = x.outlier(t, o);
    const int code = packed[each.i / 2] >> (each.i % 2 ? 0 : 4) & 15;
    sum += each.value * w.code[code] * lanes[each.i / kWide * (kWide / 8) + each.i % kWide / 32 * 4];
  }
  return sum;
}

// sums[r][s] for kManyRows decoded rows and kT tokens.
template <int kT>
void products_of_decoded(const int16_t* decoded, const Lanes* scales, int64_t padded, const Int16& x, int64_t t,
                         float (*sums)[kManyTokens]) {
  Token tokens[kT];
  Lanes totals[kManyRows][kT];
  for (int s = 0; s < kT; s++) tokens[s] = {x.at(t + s, 0), x.steps(t + s), nullptr};
  for (int r = 0; r < kManyRows; r++) {
    for (int s = 0; s < kT; s++) totals[r][s] = no_lanes();
  }
  for (int64_t i = 0; i < padded; i += kWide) {
#pragma GCC unroll 4
    for (int r = 0; r < kManyRows; r++) {
      const int16_t* row = decoded + r * padded + i;
      Sums some[kT];
      const Words first = load_words(row);
      for (int s = 0; s < kT; s++) some[s] = dot(first, load_words(tokens[s].values + i));
#pragma GCC unroll 3
      for (int j = 1; j < 4; j++) {
        const Words weights = load_words(row + j * (kWide / 4));
        for (int s = 0; s < kT; s++) some[s] = add_dot(some[s], weights, load_words(tokens[s].values + i + j * (kWide / 4)));
      }
      const Lanes scale = scales[r * (padded / kWide) + i / kWide];
      for (int s = 0; s < kT; s++) totals[r][s] = add_scaled(totals[r][s], some[s], times(scale, tokens[s].steps[i / kSameStep]));
    }
  }
  for (int r = 0; r < kManyRows; r++) {
    for (int s = 0; s < kT; s++) sums[r][s] = sum_lanes(totals[r][s]);
  }
}

template <Scaling kScaling, class T>
void linear_of_many(const Int16& x, int64_t tokens, const Weight& w, T* y, int threads) {
  const int64_t k = w.k, bytes = w.out_features * k / 2, padded = x.padded(), groups = divide_up(w.out_features, kManyRows);
  const int64_t grain = larger<int64_t>(1, divide_up(groups, 4 * larger(threads, 1)));
  parallel(groups, grain, threads, [=, &w, &x](int64_t first, int64_t last) {
    const int64_t n_scales = padded / kWide;
    const Scratch scratch(4 * Scales::room(w) + kManyRows * (2 * padded + int64_t(sizeof(Lanes)) * n_scales + padded / 2 + kBeyond));
    Lanes* const lanes = scratch.as<Lanes>();
    int16_t* const decoded = reinterpret_cast<int16_t*>(lanes + kManyRows * n_scales);
    float* const of_scales = reinterpret_cast<float*>(decoded + kManyRows * padded);
    uint8_t* const copies = reinterpret_cast<uint8_t*>(of_scales + Scales::room(w));
    Scales scales(w, kScaling, of_scales);
    const int64_t end = smaller(w.out_features, last * kManyRows);
    for (int64_t n = first * kManyRows; n < end; n += kManyRows) {
      const int count = int(smaller<int64_t>(kManyRows, end - n));
      Row rows[kManyRows];
      for (int r = 0; r < kManyRows; r++) {
        const int64_t row = n + smaller(r, count - 1), start = row * k;  // a row that is not there is another one
        rows[r] = {w.packed + start / 2, nullptr, nullptr};
        // The load of the last codes must stay within the weight.
        if ((start + padded) / 2 + kBeyond > bytes) {
          rows[r].packed = static_cast<uint8_t*>(memcpy(copies + r * (padded / 2 + kBeyond), rows[r].packed, k / 2));
        }
      }
      // The scales of a row may be overwritten when those of a later one are decoded, so each row's are used at once.
      for (int r = 0; r < kManyRows; r++) {
        const int64_t row = n + smaller(r, count - 1);
        rows[r].scales = scales.of_row(row, end);
        decode_row<kScaling>(w, rows[r], x.codes(), decoded + r * padded, lanes + r * n_scales);
      }
      for (int64_t t = 0; t < tokens; t += kManyTokens) {
        const int some = int(smaller<int64_t>(kManyTokens, tokens - t));
        float sums[kManyRows][kManyTokens];
        switch (some) {
          case 1: products_of_decoded<1>(decoded, lanes, padded, x, t, sums); break;
          case 2: products_of_decoded<2>(decoded, lanes, padded, x, t, sums); break;
          default: products_of_decoded<kManyTokens>(decoded, lanes, padded, x, t, sums); break;
        }
        for (int r = 0; r < count; r++) {
          for (int s = 0; s < some; s++) {
            if (x.outliers(t + s)) sums[r][s] += outliers_of_decoded(w, rows[r].packed, lanes + r * n_scales, x, t + s);
          }
          put(sums[r], some, w, n + r, y + t * w.out_features);
        }
      }
    }
  });
}

template <class T>
void linear_of_many(const Int16& x, int64_t tokens, const Weight& w, T* y, int threads) {
  if (w.block_size == 64 && w.k % 64 == 0) {
    linear_of_many<Scaling::kHalves>(x, tokens, w, y, threads);
  } else if (w.block_size % kChunk == 0 && w.k % kChunk == 0) {
    linear_of_many<Scaling::kOne>(x, tokens, w, y, threads);
  } else {
    linear_of_many<Scaling::kQuarters>(x, tokens, w, y, threads);
  }
}

}  // namespace

#endif
