// The scale of each block that makes the squared rounding error least. The search is defined in qcli/ops/fit_scale.py.
//
// A block is widened to float32 once, padded with zeros to whole vectors, and stays in L1 or L2 for some 50 candidates. Scales,
// inverses and limits are computed for 16 candidates at a time, errors for four: a vector of weights is loaded once for them, and
// their sums do not wait for each other. Nothing here is a fused multiply-add: every variant gives the same bits.
// With weights each squared error is multiplied by that of its column; they stand behind the block, in the same memory.

#include "functions.h"

namespace {

constexpr int kTogether = 4;
constexpr float kLeast = 0x1p-50f, kMost = 0x1p50f;

struct Form {
  const float* thresholds;  // 15, ascending; null for integers
  const float* values;      // 16, between the thresholds
  float least, most;        // of the integers
  bool zero_point;
  int dtype;  // of the scale
  float eps;  // of that dtype
  const float* coarse;
  int coarse_count;  // a multiple of 16
  const float* fine;
  int refits;
  const float* weights;  // of columns; null without
  int64_t columns;
};

// Codes are in units of the scale, with the zero point subtracted. So are the limits.
struct Integers {
  // The sum with 1.5 * 2^23 rounds to an integer, ties to even.
  QCLI_INLINE F32x16 nearest(F32x16 v, F32x16 least, F32x16 most) const {
    const F32x16 magic = all(12582912.0f);
    return minimum(maximum(v, least), most) + magic - magic;
  }
};

struct Codebook {
  Table16 tree, values;
  QCLI_INLINE F32x16 nearest(F32x16 v, F32x16, F32x16) const { return look_up<0>(values, rank16(tree, v)); }
};

struct Candidates {
  float factor[16], scale[16], inverse[16], zero[16], least[16], most[16], error[16];
};

struct Best {
  float error, factor, scale, zero;
};

QCLI_INLINE F32x16 stored(int dtype, F32x16 scale) {
  if (dtype == kFloat32) return scale;
  if (dtype == kBFloat16) {
    bf16 halves[16];
    store(halves, scale);
    return load(halves);
  }
  f16 halves[16];
  store(halves, scale);
  return load(halves);
}
QCLI_INLINE float stored(int dtype, float scale) {
  float lanes[16];
  store(lanes, stored(dtype, all(scale)));
  return lanes[0];
}

QCLI_INLINE bool usable(float scale) { return scale != 0 && __builtin_isfinite(scale); }

// A block and, where it is weighted, its weights behind it.
template <bool kWeighted>
QCLI_INLINE F32x16 weighted(F32x16 square, const float* w, int64_t length, int64_t i) {
  if constexpr (kWeighted) return square * load(w + length + i);
  return square;
}

// The errors of kCount candidates, from the candidate `first` on.
template <int kCount, bool kWeighted, class Codes>
QCLI_INLINE void measure(const float* w, int64_t length, const Codes& codes, int first, Candidates* c) {
  F32x16 scale[kCount], inverse[kCount], least[kCount], most[kCount], sum[kCount];
#pragma GCC unroll 4
  for (int j = 0; j < kCount; j++) {
    scale[j] = all(c->scale[first + j]);
    inverse[j] = all(c->inverse[first + j]);
    least[j] = all(c->least[first + j]);
    most[j] = all(c->most[first + j]);
    sum[j] = all(0.0f);
  }
  for (int64_t i = 0; i < length; i += 16) {
    const F32x16 x = load(w + i);
#pragma GCC unroll 4
    for (int j = 0; j < kCount; j++) {
      const F32x16 difference = x - codes.nearest(x * inverse[j], least[j], most[j]) * scale[j];
      sum[j] = sum[j] + weighted<kWeighted>(difference * difference, w, length, i);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kCount; j++) c->error[first + j] = sum_lanes(sum[j]);
}

QCLI_INLINE void take_better(const Candidates& c, int i, Best* best) {
  if (!usable(c.scale[i]) || !(c.error[i] < best->error)) return;
  *best = {c.error[i], c.factor[i], c.scale[i], c.zero[i]};
}

// Sixteen factors of the start.
template <bool kWeighted, class Codes>
QCLI_INLINE void try_factors(const float* w, int64_t length, const Codes& codes, const Form& form, float start, float low,
                             F32x16 factor, Best* best) {
  Candidates c;
  const F32x16 scale = stored(form.dtype, all(start) * factor), least = all(form.least), most = all(form.most);
  F32x16 zero = all(0.0f);
  if (form.zero_point) {
    const F32x16 magic = all(12582912.0f);
    zero = minimum(maximum(least - (all(low) * factor) / scale, least), most) + magic - magic;
  }
  store(c.factor, factor);
  store(c.scale, scale);
  store(c.inverse, all(1.0f) / scale);
  store(c.zero, zero);
  store(c.least, least - zero);
  store(c.most, most - zero);
  for (int i = 0; i < 16; i += kTogether) measure<kTogether, kWeighted>(w, length, codes, i, &c);
  for (int i = 0; i < 16; i++) take_better(c, i, best);
}

// The least squares scale for the best codes.
template <bool kWeighted, class Codes>
QCLI_INLINE void refit(const float* w, int64_t length, const Codes& codes, const Form& form, Best* best) {
  const F32x16 inverse = all(1.0f / best->scale), least = all(form.least - best->zero), most = all(form.most - best->zero);
  F32x16 products = all(0.0f), squares = products;
  for (int64_t i = 0; i < length; i += 16) {
    const F32x16 x = load(w + i), code = codes.nearest(x * inverse, least, most);
    products = products + weighted<kWeighted>(x * code, w, length, i);
    squares = squares + weighted<kWeighted>(code * code, w, length, i);
  }
  Candidates c;
  c.factor[0] = best->factor;
  c.scale[0] = stored(form.dtype, sum_lanes(products) / sum_lanes(squares));
  if (!usable(c.scale[0])) return;
  c.inverse[0] = 1.0f / c.scale[0];
  c.zero[0] = best->zero;
  c.least[0] = form.least - best->zero;
  c.most[0] = form.most - best->zero;
  measure<1, kWeighted>(w, length, codes, 0, &c);
  take_better(c, 0, best);
}

template <bool kWeighted, class Codes>
QCLI_INLINE void search(const float* w, int64_t length, const Codes& codes, const Form& form, float start, float low, Best* best) {
  for (int i = 0; i < form.coarse_count; i += 16) {
    try_factors<kWeighted>(w, length, codes, form, start, low, load(form.coarse + i), best);
  }
  try_factors<kWeighted>(w, length, codes, form, start, low, all(best->factor) * load(form.fine), best);
  for (int i = 0; i < form.refits; i++) refit<kWeighted>(w, length, codes, form, best);
}

// The zero point of the factor 1. It is 0 if it is not a number.
float first_zero(const Form& form, float low, float scale) {
  const float zero = form.least - low / scale;
  if (zero != zero) return 0.0f;
  return nearbyintf(zero < form.least ? form.least : zero > form.most ? form.most : zero);
}

// `first` is the place of the block's first element in the whole, by which its columns are known.
template <class T, class Codes>
Best fit_block(const T* x, int64_t count, int64_t first_element, float* w, const Codes& codes, const Form& form) {
  F32x16 lows = all(0.0f), highs = lows;
  int64_t length = 0;
  for (; length < count; length += 16) {
    const F32x16 part = load_some(x + length, count - length);
    store(w + length, part);
    lows = minimum(part, lows);
    highs = maximum(part, highs);
  }
  const float largest = absmax_of(x, count), low = -max_lanes(all(0.0f) - lows), high = max_lanes(highs);
  const bool zero_point = form.zero_point && largest == largest;  // low and high leave NaN out
  const float range = form.most - form.least;
  const float start = form.thresholds ? largest : zero_point ? (high - low) / range : largest / (range / 2);
  float first = stored(form.dtype, start);
  const bool searched = largest >= kLeast && largest <= kMost && usable(first);
  if (!form.thresholds && first == 0) first = form.eps;
  Best best = {from_bits(kInfinity), 1.0f, first, zero_point ? first_zero(form, low, first) : 0.0f};
  if (searched && form.weights) {
    float* weights = w + length;
    int64_t column = first_element % form.columns;
    for (int64_t i = 0; i < length; i++) {
      weights[i] = i < count ? form.weights[column] : 0.0f;
      if (++column == form.columns) column = 0;
    }
    search<true>(w, length, codes, form, start, low, &best);
  } else if (searched) {
    search<false>(w, length, codes, form, start, low, &best);
  }
  if (best.scale != best.scale) best.scale = from_bits(kNaN);
  return best;
}

template <class T>
void fit(const void* input, int64_t count, int64_t size, const Form& form, float* scale, int8_t* zero_point, int threads) {
  const T* x = static_cast<const T*>(input);
  const Search16 tree = form.thresholds ? search16(form.thresholds) : Search16{};
  parallel(divide_up(count, size), divide_up(1 << 13, size), threads, [=, &tree, &form](int64_t begin, int64_t end) {
    const Scratch scratch(divide_up(smaller(size, count), 16) * 128);
    float* w = scratch.as<float>();
    for (int64_t b = begin; b < end; b++) {
      const T* block = x + b * size;
      const int64_t length = smaller(size, count - b * size);
      Best best;
      if (form.thresholds) {
        best = fit_block(block, length, b * size, w, Codebook{table16(tree.tree), table16(form.values)}, form);
      } else {
        best = fit_block(block, length, b * size, w, Integers{}, form);
      }
      scale[b] = best.scale;
      if (form.zero_point) zero_point[b] = int8_t(best.zero);
    }
  });
}

}  // namespace

// x [count] of `dtype`. thresholds [15] and values [16] belong to a codebook; both are null for integers of `bits` bits.
// scale_dtype and eps are those of a stored scale. coarse [coarse_count], a multiple of 16, and fine [16] are factors.
// weights [columns] of the elements' columns, or null.
// scale float32 [ceil(count / size)]; zero_points int8 [ceil(count / size)], not written without zero points.
QCLI_KERNEL(fit_scale)
(const void* x, int dtype, int64_t count, int64_t size, const float* thresholds, const float* values, int bits, int zero_point,
 int scale_dtype, float eps, const float* coarse, int coarse_count, const float* fine, int refits, const float* weights,
 int64_t columns, float* scale, int8_t* zero_points, int threads) {
  const float least = thresholds ? 0.0f : -float(1 << (bits - 1));
  const Form form = {thresholds, values, least, -least - 1, zero_point != 0, scale_dtype, eps, coarse,
                     coarse_count, fine, refits, weights, columns};
  QCLI_DISPATCH(dtype, fit, x, count, size, form, scale, zero_points, threads)
}
