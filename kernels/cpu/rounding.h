// Shared by the kernels that round rows under scales: values in the dtype of a scale, and the sums of what rounding cost.
//
// Squares are float32. They are added in sixteen float64 lanes, in the order of the elements, and the lanes in theirs.
#pragma once

#include "functions.h"

namespace {

constexpr int64_t kGrain = 1 << 15;  // elements that a thread takes at least

// x rounded to T, to nearest with ties to even. It must not be NaN with a full payload.
#if defined(__AVX512F__)

QCLI_INLINE F32x16 through(const f16*, F32x16 x) {
  return {_mm512_cvtph_ps(_mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
}
struct F64x16 {
  __m512d a, b;
};
QCLI_INLINE F64x16 zeros() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
QCLI_INLINE F64x16 operator+(F64x16 sum, F32x16 x) {
  return {_mm512_add_pd(sum.a, _mm512_cvtps_pd(_mm512_castps512_ps256(x.v))),
          _mm512_add_pd(sum.b, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1)))};
}

#elif defined(__AVX2__)

QCLI_INLINE __m256 through_f16(__m256 x) { return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
QCLI_INLINE F32x16 through(const f16*, F32x16 x) { return {through_f16(x.a), through_f16(x.b)}; }
struct F64x16 {
  __m256d a, b, c, d;
};
QCLI_INLINE F64x16 zeros() { return {_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd()}; }
QCLI_INLINE F64x16 operator+(F64x16 sum, F32x16 x) {
  return {_mm256_add_pd(sum.a, _mm256_cvtps_pd(_mm256_castps256_ps128(x.a))),
          _mm256_add_pd(sum.b, _mm256_cvtps_pd(_mm256_extractf128_ps(x.a, 1))),
          _mm256_add_pd(sum.c, _mm256_cvtps_pd(_mm256_castps256_ps128(x.b))),
          _mm256_add_pd(sum.d, _mm256_cvtps_pd(_mm256_extractf128_ps(x.b, 1)))};
}

#else

QCLI_INLINE F32x16 through(const f16*, F32x16 x) {
  f16 halves[16];
  store(halves, x);
  return load(halves);
}
struct F64x16 {
  double v[16];
};
QCLI_INLINE F64x16 zeros() { return {}; }
QCLI_INLINE F64x16 operator+(F64x16 sum, F32x16 x) {
  QCLI_LANES(i) sum.v[i] += double(x.v[i]);
  return sum;
}

#endif

QCLI_INLINE F32x16 through(const float*, F32x16 x) { return x; }
QCLI_INLINE F32x16 through(const bf16*, F32x16 x) {
  const I32x16 bits = as_ints(x), odd = right<16>(bits) & all(int32_t(1));
  return as_floats((bits + all(int32_t(0x7fff)) + odd) & all(int32_t(0xffff0000)));
}
template <class T>
QCLI_INLINE float through(float x) {
  T narrow;
  from_float(x, &narrow);
  return to_float(narrow);
}

// A scale up to which 255 times it is finite in T.
QCLI_INLINE constexpr float most_scale(const float*) { return 1e36f; }
QCLI_INLINE constexpr float most_scale(const bf16*) { return 1e36f; }
QCLI_INLINE constexpr float most_scale(const f16*) { return 255.0f; }

struct Sums {
  F64x16 error, norm;
  int64_t nonfinite;
};
QCLI_INLINE Sums no_sums() { return {zeros(), zeros(), 0}; }

// Adds elements w and what is stored of them. An element that is not finite, or is stored as such, is in neither sum; kChecked says
// that there may be one.
template <bool kChecked>
QCLI_INLINE void note(F32x16 w, F32x16 stored, Sums* sums) {
  const F32x16 difference = w - stored;
  F32x16 error = difference * difference, norm = w * w;
  if (kChecked) {
    const F32x16 infinity = all(from_bits(kInfinity)), zero = all(0.0f), size = magnitudes(w), stored_size = magnitudes(stored);
    error = where_less(size, infinity, where_less(stored_size, infinity, error, zero), zero);
    norm = where_less(size, infinity, where_less(stored_size, infinity, norm, zero), zero);
    sums->nonfinite += int64_t(sum_lanes(where_less(size, infinity, zero, all(1.0f))));
  }
  sums->error = sums->error + error;
  sums->norm = sums->norm + norm;
}

QCLI_INLINE double total(F64x16 lanes) {
  double values[16], sum = 0;
  memcpy(values, &lanes, sizeof values);
  for (int i = 0; i < 16; i++) sum += values[i];
  return sum;
}
// To three of `partial`.
QCLI_INLINE void write_sums(const Sums& sums, double* partial) {
  partial[0] = total(sums.error);
  partial[1] = total(sums.norm);
  partial[2] = double(sums.nonfinite);
}

template <class Byte>
QCLI_INLINE void store_some_bytes(Byte* p, I32x16 x, int64_t count) {
  if (count >= 16) {
    store_bytes(p, x);
    return;
  }
  Byte bytes[16];
  store_bytes(bytes, x);
  memcpy(p, bytes, count);
}

}  // namespace
