// The LLM.int8() product (arXiv:2208.07339, equation 8); the definition is in qcli/ops/linear_int8.py.
//
//   y = int32(q_x q_w^T) * absmax_x / 127^2 * absmax_w  +  x[:, outliers] W[:, outliers]^T  +  bias
//
// For a few tokens the weight is streamed once: K bytes a row against 2 K operations a token, so memory sets the pace. VNNI
// multiplies unsigned by signed bytes, hence (q_x + 128) q_w, less 128 times the row's sum, in wrapping integers.
// For many tokens the integer product is the caller's (torch._int_mm), and the rest is one pass over it.

#include <cstdlib>

#include "simd.h"

namespace {

constexpr int kGroup = 4;  // tokens that share one reading of a weight row

struct Outliers {
  int64_t count;
  const int64_t* columns;  // [count], ascending
  const float* x;          // [rows, count]
};

// A weight in the activation's dtype, as the definition has it.
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

// q_x is stored as q + 128 where VNNI reads it, with whole vectors of padding.
#if defined(__AVX512VNNI__)
constexpr int kWidth = 64, kShift = 128;

template <int kTokens>
QCLI_INLINE void products(const uint8_t* x, int64_t padded, const int8_t* w, int64_t k, int32_t* sums) {
  __m512i total[kTokens], row = _mm512_setzero_si512();
  for (int t = 0; t < kTokens; t++) total[t] = row;
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t i = 0; i < k; i += kWidth) {
    const __mmask64 mask = k - i >= kWidth ? ~__mmask64(0) : (__mmask64(1) << (k - i)) - 1;
    const __m512i weights = _mm512_maskz_loadu_epi8(mask, w + i);
    row = _mm512_dpbusd_epi32(row, ones, weights);
    for (int t = 0; t < kTokens; t++) {
      total[t] = _mm512_dpbusd_epi32(total[t], _mm512_loadu_si512(x + t * padded + i), weights);
    }
  }
  const uint32_t correction = uint32_t(_mm512_reduce_add_epi32(row)) * kShift;
  for (int t = 0; t < kTokens; t++) sums[t] = int32_t(uint32_t(_mm512_reduce_add_epi32(total[t])) - correction);
}
#elif defined(__AVX2__)
constexpr int kWidth = 16, kShift = 0;

template <int kTokens>
QCLI_INLINE void products(const uint8_t* x, int64_t padded, const int8_t* w, int64_t k, int32_t* sums) {
  __m256i total[kTokens];
  for (int t = 0; t < kTokens; t++) total[t] = _mm256_setzero_si256();
  for (int64_t i = 0; i < k; i += kWidth) {
    int8_t rest[kWidth] = {};
    const int8_t* from = w + i;
    if (k - i < kWidth) from = static_cast<const int8_t*>(memcpy(rest, from, k - i));
    const __m256i weights = _mm256_cvtepi8_epi16(load_sixteen_bytes(from));
    for (int t = 0; t < kTokens; t++) {
      const __m256i q = _mm256_cvtepi8_epi16(load_sixteen_bytes(x + t * padded + i));
      total[t] = _mm256_add_epi32(total[t], _mm256_madd_epi16(q, weights));
    }
  }
  for (int t = 0; t < kTokens; t++) {
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(total[t]), _mm256_extracti128_si256(total[t], 1));
    const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    sums[t] = _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
  }
}
#else
constexpr int kWidth = 1, kShift = 0;

template <int kTokens>
QCLI_INLINE void products(const uint8_t* x, int64_t padded, const int8_t* w, int64_t k, int32_t* sums) {
  for (int t = 0; t < kTokens; t++) {
    const int8_t* q = reinterpret_cast<const int8_t*>(x + t * padded);
    int32_t sum = 0;
    for (int64_t i = 0; i < k; i++) sum += int32_t(q[i]) * w[i];
    sums[t] = sum;
  }
}
#endif

QCLI_INLINE void products(int tokens, const uint8_t* x, int64_t padded, const int8_t* w, int64_t k, int32_t* sums) {
  switch (tokens) {
    case 1: products<1>(x, padded, w, k, sums); break;
    case 2: products<2>(x, padded, w, k, sums); break;
    case 3: products<3>(x, padded, w, k, sums); break;
    default: products<4>(x, padded, w, k, sums); break;
  }
}

template <class T>
void linear(const int8_t* q, const float* absmax, int64_t rows, const int8_t* weight, const float* scale,
            const Outliers& outliers, const float* bias, int64_t out_features, int64_t k, void* output, int threads) {
  T* y = static_cast<T*>(output);
  const int64_t padded = divide_up(k, kWidth) * kWidth;
  uint8_t* x = static_cast<uint8_t*>(malloc(rows * padded + 1));
  for (int64_t r = 0; r < rows; r++) {
    uint8_t* to = x + r * padded;
    for (int64_t i = 0; i < k; i++) to[i] = uint8_t(q[r * k + i] + kShift);
    memset(to + k, 0, padded - k);
  }
  const int64_t grain = divide_up(out_features, 8 * larger(threads, 1));
  parallel(out_features, grain, threads, [=, &outliers](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; n++) {
      const int8_t* w = weight + n * k;
      const float step = scale[n] * float(1.0 / 127);
      for (int64_t r = 0; r < rows; r += kGroup) {
        const int tokens = int(smaller<int64_t>(kGroup, rows - r));
        int32_t sums[kGroup];
        products(tokens, x + r * padded, padded, w, k, sums);
        for (int t = 0; t < tokens; t++) {
          float others = 0;
          const float* kept_x = outliers.x + (r + t) * outliers.count;
          for (int64_t o = 0; o < outliers.count; o++) others += kept_x[o] * kept<T>(w[outliers.columns[o]], step);
          if (bias) others += bias[n];
          finish(sums[t], absmax[r + t], scale[n], others, &y[(r + t) * out_features + n]);
        }
      }
    }
  });
  free(x);
}

template <class T>
void epilogue(const int32_t* sums, const float* absmax, int64_t rows, const int8_t* weight, const float* scale,
              const Outliers& outliers, const float* bias, int64_t out_features, int64_t k, void* output, int threads) {
  constexpr int64_t kTile = 64;
  T* y = static_cast<T*>(output);
  parallel(divide_up(out_features, kTile), 1, threads, [=, &outliers](int64_t first, int64_t last) {
    float* kept_w = static_cast<float*>(malloc(outliers.count * kTile * sizeof(float) + 1));
    for (int64_t tile = first; tile < last; tile++) {
      const int64_t start = tile * kTile, width = smaller(kTile, out_features - start);
      for (int64_t o = 0; o < outliers.count; o++) {
        for (int64_t i = 0; i < width; i++) {
          const float step = scale[start + i] * float(1.0 / 127);
          kept_w[o * kTile + i] = kept<T>(weight[(start + i) * k + outliers.columns[o]], step);
        }
      }
      for (int64_t r = 0; r < rows; r++) {
        float others[kTile] = {};
        for (int64_t o = 0; o < outliers.count; o++) {
          const float value = outliers.x[r * outliers.count + o];
          for (int64_t i = 0; i < width; i++) others[i] += value * kept_w[o * kTile + i];
        }
        if (bias) {
          for (int64_t i = 0; i < width; i++) others[i] += bias[start + i];
        }
        const int64_t place = r * out_features + start;
        for (int64_t i = 0; i < width; i++) finish(sums[place + i], absmax[r], scale[start + i], others[i], &y[place + i]);
      }
    }
    free(kept_w);
  });
}

}  // namespace

// q int8 [rows, k] and absmax float32 [rows] from quantize_int8; weight int8 [out_features, k]; scale float32
// [out_features]; outlier_columns int64 [outliers]; outlier_x float32 [rows, outliers]; bias float32 or null;
// y [rows, out_features] of `dtype`.
QCLI_KERNEL(linear_int8)
(const int8_t* q, const float* absmax, int64_t rows, const int8_t* weight, const float* scale, int64_t outliers,
 const int64_t* outlier_columns, const float* outlier_x, const float* bias, int64_t out_features, int64_t k, int dtype,
 void* y, int threads) {
  const Outliers kept_apart = {outliers, outlier_columns, outlier_x};
  QCLI_DISPATCH(dtype, linear, q, absmax, rows, weight, scale, kept_apart, bias, out_features, k, y, threads)
}

// The same from the integer product, sums int32 [rows, out_features].
QCLI_KERNEL(linear_int8_epilogue)
(const int32_t* sums, const float* absmax, int64_t rows, const int8_t* weight, const float* scale, int64_t outliers,
 const int64_t* outlier_columns, const float* outlier_x, const float* bias, int64_t out_features, int64_t k, int dtype,
 void* y, int threads) {
  const Outliers kept_apart = {outliers, outlier_columns, outlier_x};
  QCLI_DISPATCH(dtype, epilogue, sums, absmax, rows, weight, scale, kept_apart, bias, out_features, k, y, threads)
}
