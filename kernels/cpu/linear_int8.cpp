// The LLM.int8() product (arXiv:2208.07339, equation 8); the definition is in qcli/ops/linear_int8.py.
//
//   y = int32(q_x q_w^T) * absmax_x / 127^2 * absmax_w  +  x[:, outliers] W[:, outliers]^T  +  x[:, fixed] original^T  +  bias
//
// For few tokens x is quantized here and the weight is read once: K bytes per row and 2 K operations per token, so memory is the
// limit. VNNI multiplies unsigned by signed bytes, hence (q_x + 128) q_w, minus 128 times the row's sum, in wrapping integers.
// For many tokens the caller makes the integer product (torch._int_mm), and the rest is one pass over it.

#include "int8_rows.h"

namespace {

// Tokens share one reading of a weight row. Rows that are multiplied together are far apart, so memory fetches as many streams at
// once.
constexpr int kTokens = 4, kRows = 4;
constexpr int kPieces = 2;  // pieces of rows per thread; few, because each begins with streams that are not prefetched

// Columns that are never rounded, and the unquantized weight there.
struct Fixed {
  int64_t count;
  const int32_t* columns;  // [count]
  const void* original;    // [out_features, count]
  int64_t dtype;
};

// The layout is that of the Record in qcli/ops/linear_int8.py.
struct Weight {
  const int8_t* q;     // [out_features, k]
  const float* scale;  // [out_features]
  Bias bias;           // [out_features]
  int64_t out_features, k;
  float threshold;
  Fixed fixed;
};

struct Outliers {
  int64_t count;
  const int64_t* columns;  // [count], ascending
  const float* x;          // [tokens, count]
};

// The original weight, rounded to the activation's dtype T: where it is exact, and its values.
template <class T, class W>
constexpr bool kExact = false;
template <class W>
constexpr bool kExact<float, W> = true;
template <>
constexpr bool kExact<bf16, bf16> = true;
template <>
constexpr bool kExact<f16, f16> = true;

template <class T, class W>
QCLI_INLINE float original(const W* weight) {
  T value;
  from_float(to_float(*weight), &value);
  return to_float(value);
}

template <class T, class W>
float fixed_product(const W* weight, const float* x, int64_t count) {
  float sum = 0;
  int64_t i = 0;
  if (kExact<T, W>) {
    F32x16 sums = all(0.0f);
    for (; i + 16 <= count; i += 16) sums = fused(load(x + i), load(weight + i), sums);
    sum = sum_lanes(sums);
  }
  for (; i < count; i++) sum += x[i] * original<T>(weight + i);
  return sum;
}

// The part of row n in the fixed columns, whose activations are x.
template <class T>
float fixed_product(const Fixed& fixed, int64_t n, const float* x) {
  const int64_t start = n * fixed.count;
  switch (fixed.count ? fixed.dtype : -1) {
    case kFloat32: return fixed_product<T>(static_cast<const float*>(fixed.original) + start, x, fixed.count);
    case kBFloat16: return fixed_product<T>(static_cast<const bf16*>(fixed.original) + start, x, fixed.count);
    case kFloat16: return fixed_product<T>(static_cast<const f16*>(fixed.original) + start, x, fixed.count);
    default: return 0;
  }
}

// kept[o * pitch + i] is the fixed column o of row start + i.
template <class T, class W>
void spread(const W* weight, int64_t start, int64_t rows, int64_t count, int64_t pitch, float* kept) {
  for (int64_t i = 0; i < rows; i++) {
    for (int64_t o = 0; o < count; o++) kept[o * pitch + i] = original<T>(weight + (start + i) * count + o);
  }
}

template <class T>
void spread(const Fixed& fixed, int64_t start, int64_t rows, int64_t pitch, float* kept) {
  switch (fixed.count ? fixed.dtype : -1) {
    case kFloat32: spread<T>(static_cast<const float*>(fixed.original), start, rows, fixed.count, pitch, kept); break;
    case kBFloat16: spread<T>(static_cast<const bf16*>(fixed.original), start, rows, fixed.count, pitch, kept); break;
    case kFloat16: spread<T>(static_cast<const f16*>(fixed.original), start, rows, fixed.count, pitch, kept); break;
    default: break;
  }
}

// A dequantized weight, rounded to the activation's dtype.
template <class T>
QCLI_INLINE float kept(int8_t weight, float step) {
  T value;
  from_float(float(weight) * step, &value);
  return to_float(value);
}

template <class T>
QCLI_INLINE void finish(int32_t sum, float absmax_x, float absmax_w, float others, T* y) {
  from_float(float(sum) * (absmax_x * float(1.0 / (127 * 127))) * absmax_w + others, y);
}

// q_x is stored as q + 128 for VNNI, and padded with zeros to whole vectors. The results are sums[r][t].
#if defined(__AVX512VNNI__)
constexpr int kWidth = 64, kShift = 128;
constexpr int64_t kAhead = 1024;  // bytes; the hardware's own prefetching stops at page borders

template <int kT, int kR>
void products(const uint8_t* x, int64_t padded, const int8_t* const* w, int64_t k, int32_t (*sums)[kTokens]) {
  __m512i totals[kR][kT], own[kR];
  for (int r = 0; r < kR; r++) {
    own[r] = _mm512_setzero_si512();
    for (int t = 0; t < kT; t++) totals[r][t] = own[r];
  }
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t i = 0; i < k; i += kWidth) {
    const __mmask64 mask = k - i >= kWidth ? ~__mmask64(0) : (__mmask64(1) << (k - i)) - 1;
    for (int r = 0; r < kR; r++) {
      __builtin_prefetch(w[r] + i + kAhead);
      const __m512i weights = _mm512_maskz_loadu_epi8(mask, w[r] + i);
      own[r] = _mm512_dpbusd_epi32(own[r], ones, weights);
      for (int t = 0; t < kT; t++) {
        totals[r][t] = _mm512_dpbusd_epi32(totals[r][t], _mm512_loadu_si512(x + t * padded + i), weights);
      }
    }
  }
  for (int r = 0; r < kR; r++) {
    const uint32_t correction = uint32_t(_mm512_reduce_add_epi32(own[r])) * kShift;
    for (int t = 0; t < kT; t++) sums[r][t] = int32_t(uint32_t(_mm512_reduce_add_epi32(totals[r][t])) - correction);
  }
}
#elif defined(__AVX2__)
constexpr int kWidth = 16, kShift = 0;

template <int kT, int kR>
void products(const uint8_t* x, int64_t padded, const int8_t* const* w, int64_t k, int32_t (*sums)[kTokens]) {
  __m256i totals[kR][kT];
  for (int r = 0; r < kR; r++) {
    for (int t = 0; t < kT; t++) totals[r][t] = _mm256_setzero_si256();
  }
  for (int64_t i = 0; i < k; i += kWidth) {
    for (int r = 0; r < kR; r++) {
      int8_t rest[kWidth] = {};
      const int8_t* from = w[r] + i;
      if (k - i < kWidth) from = static_cast<const int8_t*>(memcpy(rest, from, k - i));
      const __m256i weights = _mm256_cvtepi8_epi16(load_sixteen_bytes(from));
      for (int t = 0; t < kT; t++) {
        const __m256i q = _mm256_cvtepi8_epi16(load_sixteen_bytes(x + t * padded + i));
        totals[r][t] = _mm256_add_epi32(totals[r][t], _mm256_madd_epi16(q, weights));
      }
    }
  }
  for (int r = 0; r < kR; r++) {
    for (int t = 0; t < kT; t++) {
      const __m256i total = totals[r][t];
      const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
      const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
      sums[r][t] = _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
    }
  }
}
#else
constexpr int kWidth = 1, kShift = 0;

template <int kT, int kR>
void products(const uint8_t* x, int64_t padded, const int8_t* const* w, int64_t k, int32_t (*sums)[kTokens]) {
  for (int r = 0; r < kR; r++) {
    for (int t = 0; t < kT; t++) {
      const int8_t* q = reinterpret_cast<const int8_t*>(x + t * padded);
      int32_t sum = 0;
      for (int64_t i = 0; i < k; i++) sum += int32_t(q[i]) * w[r][i];
      sums[r][t] = sum;
    }
  }
}
#endif

template <int kT>
void products(int count, const uint8_t* x, int64_t padded, const int8_t* const* w, int64_t k, int32_t (*sums)[kTokens]) {
  if (count == kRows) {
    products<kT, kRows>(x, padded, w, k, sums);
  } else {
    for (int r = 0; r < count; r++) products<kT, 1>(x, padded, w + r, k, sums + r);
  }
}

void products(int tokens, int count, const uint8_t* x, int64_t padded, const int8_t* const* w, int64_t k,
              int32_t (*sums)[kTokens]) {
  switch (tokens) {
    case 1: products<1>(count, x, padded, w, k, sums); break;
    case 2: products<2>(count, x, padded, w, k, sums); break;
    case 3: products<3>(count, x, padded, w, k, sums); break;
    default: products<kTokens>(count, x, padded, w, k, sums); break;
  }
}

// x in int8, and its outliers and fixed columns separately.
class Tokens {
 public:
  template <class T>
  Tokens(const T* given, int64_t tokens, int64_t k, float threshold, const Fixed& fixed)
      : rest_(fixed.count ? tokens * k * sizeof(T) : 0),
        fixed_count_(fixed.count),
        fixed_(4 * tokens * fixed.count),
        padded_(divide_up(k, kWidth) * kWidth),
        q_(tokens * padded_),
        absmax_(4 * tokens),
        marks_(k),
        count_(mark(without(given, tokens, k, fixed), tokens, k, threshold)),
        columns_(8 * count_),
        kept_(4 * tokens * count_),
        outliers_{count_, columns_.as<int64_t>(), kept_.as<float>()} {
    const int64_t count = count_;
    const T* x = fixed.count ? rest_.as<T>() : given;
    for (int64_t i = 0, o = 0; o < count; i++) {
      if (marks_.as<uint8_t>()[i]) columns_.as<int64_t>()[o++] = i;
    }
    for (int64_t t = 0; t < tokens; t++) {
      int8_t* q = q_.as<int8_t>() + t * padded_;
      quantize_row(x + t * k, k, absmax(t), q);
      for (int64_t o = 0; o < count; o++) {
        kept_.as<float>()[t * count + o] = to_float(x[t * k + outliers_.columns[o]]);
        q[outliers_.columns[o]] = 0;
      }
      for (int64_t i = 0; i < k; i++) q[i] = int8_t(uint8_t(q[i]) + kShift);
      memset(q + k, 0, padded_ - k);
    }
  }
  const uint8_t* q(int64_t t) const { return q_.as<uint8_t>() + t * padded_; }
  int64_t padded() const { return padded_; }
  float absmax(int64_t t) const { return absmax_.as<float>()[t]; }
  const Outliers& outliers() const { return outliers_; }
  const float* fixed(int64_t t) const { return fixed_.as<float>() + t * fixed_count_; }

 private:
  // The tokens with zeros in the fixed columns, whose values are put aside.
  template <class T>
  const T* without(const T* x, int64_t tokens, int64_t k, const Fixed& fixed) {
    if (!fixed.count) return x;
    T* rest = rest_.as<T>();
    memcpy(rest, x, tokens * k * sizeof(T));
    for (int64_t t = 0; t < tokens; t++) {
      for (int64_t o = 0; o < fixed.count; o++) {
        const int64_t place = t * k + fixed.columns[o];
        fixed_.as<float>()[t * fixed.count + o] = to_float(x[place]);
        rest[place] = T{};
      }
    }
    return rest;
  }

  // Finds absmax of the tokens, marks their outlier columns and counts the marks.
  template <class T>
  int64_t mark(const T* x, int64_t tokens, int64_t k, float threshold) {
    uint8_t* marks = marks_.as<uint8_t>();
    memset(marks, 0, k);
    for (int64_t t = 0; t < tokens; t++, x += k) {
      absmax_.as<float>()[t] = threshold > 0 ? find_outliers(x, k, threshold, marks) : absmax_of(x, k);
    }
    int64_t count = 0;
    for (int64_t i = 0; i < k; i++) count += marks[i];
    return count;
  }

  Scratch rest_;
  int64_t fixed_count_;
  Scratch fixed_;
  int64_t padded_;
  Scratch q_, absmax_, marks_;
  int64_t count_;
  Scratch columns_, kept_;
  Outliers outliers_;
};

template <class T>
void linear(const void* input, int64_t tokens, const Weight& w, void* output, int threads) {
  T* y = static_cast<T*>(output);
  const Tokens x(static_cast<const T*>(input), tokens, w.k, w.threshold, w.fixed);
  const Outliers& outliers = x.outliers();
  const auto put = [=, &w, &x, &outliers](int64_t n, int64_t t, int32_t sum) {
    const float step = w.scale[n] * float(1.0 / 127);
    float others = 0;
    for (int64_t o = 0; o < outliers.count; o++) {
      others += outliers.x[t * outliers.count + o] * kept<T>(w.q[n * w.k + outliers.columns[o]], step);
    }
    others += fixed_product<T>(w.fixed, n, x.fixed(t));
    finish(sum, x.absmax(t), w.scale[n], others + w.bias.at(n), &y[t * w.out_features + n]);
  };
  parallel(w.out_features, divide_up(w.out_features, kPieces * larger(threads, 1)), threads, [=, &w, &x](int64_t first, int64_t last) {
    const int64_t apart = divide_up(last - first, kRows);
    for (int64_t i = first; i < first + apart; i++) {
      const int8_t* together[kRows];
      int count = 0;
      for (int64_t n = i; n < last; n += apart) together[count++] = w.q + n * w.k;
      for (int64_t t = 0; t < tokens; t += kTokens) {
        const int some = int(smaller<int64_t>(kTokens, tokens - t));
        int32_t sums[kRows][kTokens];
        products(some, count, x.q(t), x.padded(), together, w.k, sums);
        for (int r = 0; r < count; r++) {
          for (int s = 0; s < some; s++) put(i + r * apart, t + s, sums[r][s]);
        }
      }
    }
  });
}

template <class T>
void epilogue(const int32_t* sums, const float* absmax, int64_t tokens, const Weight& w, const Outliers& outliers, void* output,
              int threads) {
  constexpr int64_t kTile = 64;
  const int64_t count = outliers.count + w.fixed.count;
  T* y = static_cast<T*>(output);
  parallel(divide_up(w.out_features, kTile), 1, threads, [=, &w, &outliers](int64_t first, int64_t last) {
    const Scratch scratch(4 * count * kTile);
    float* kept_w = scratch.as<float>();
    for (int64_t tile = first; tile < last; tile++) {
      const int64_t start = tile * kTile, width = smaller(kTile, w.out_features - start);
      float bias[kTile];
      for (int64_t i = 0; i < width; i++) bias[i] = w.bias.at(start + i);
      for (int64_t o = 0; o < outliers.count; o++) {
        for (int64_t i = 0; i < width; i++) {
          const float step = w.scale[start + i] * float(1.0 / 127);
          kept_w[o * kTile + i] = kept<T>(w.q[(start + i) * w.k + outliers.columns[o]], step);
        }
      }
      spread<T>(w.fixed, start, width, kTile, kept_w + outliers.count * kTile);
      for (int64_t t = 0; t < tokens; t++) {
        float others[kTile] = {};
        for (int64_t o = 0; o < count; o++) {
          const float value = outliers.x[t * count + o];
          for (int64_t i = 0; i < width; i++) others[i] += value * kept_w[o * kTile + i];
        }
        const int64_t place = t * w.out_features + start;
        for (int64_t i = 0; i < width; i++) {
          finish(sums[place + i], absmax[t], w.scale[start + i], others[i] + bias[i], &y[place + i]);
        }
      }
    }
  });
}

}  // namespace

// x [tokens, k] and y [tokens, out_features] of `dtype`.
QCLI_KERNEL(linear_int8)(const void* x, int dtype, int64_t tokens, const void* weight, void* y, int threads) {
  QCLI_DISPATCH(dtype, linear, x, tokens, *static_cast<const Weight*>(weight), y, threads)
}

QCLI_LINEAR_STEP(linear_int8_step, linear<float>)

// The same, from the integer product `sums` int32 [tokens, out_features] and the results of quantize_int8 for x: absmax float32
// [tokens], the outliers' columns int64 [outliers] and values float32 [tokens, outliers + fixed columns].
QCLI_KERNEL(linear_int8_epilogue)
(const int32_t* sums, const float* absmax, int64_t tokens, const void* weight, int64_t outliers, const int64_t* columns,
 const float* values, int dtype, void* y, int threads) {
  const Outliers apart = {outliers, columns, values};
  QCLI_DISPATCH(dtype, epilogue, sums, absmax, tokens, *static_cast<const Weight*>(weight), apart, y, threads)
}
