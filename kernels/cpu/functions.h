// exp, tanh and erf in sixteen lanes, and what they need. Nothing here is a fused multiply-add: every variant gives the same bits.
#pragma once

#include "simd.h"

namespace {

// maximum and minimum compare a with b, and give b if they are not ordered. A NaN in b therefore stays.
#if defined(__AVX512F__)

QCLI_INLINE F32x16 operator/(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
QCLI_INLINE F32x16 maximum(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
QCLI_INLINE F32x16 minimum(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
// yes where a < b, else no.
QCLI_INLINE F32x16 where_less(F32x16 a, F32x16 b, F32x16 yes, F32x16 no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
QCLI_INLINE F32x16 as_floats(I32x16 x) { return {_mm512_castsi512_ps(x.v)}; }

#elif defined(__AVX2__)

QCLI_INLINE F32x16 operator/(F32x16 x, F32x16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
QCLI_INLINE F32x16 maximum(F32x16 x, F32x16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
QCLI_INLINE F32x16 minimum(F32x16 x, F32x16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
QCLI_INLINE F32x16 where_less(F32x16 x, F32x16 y, F32x16 yes, F32x16 no) {
  return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
          _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
}
QCLI_INLINE F32x16 as_floats(I32x16 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }

#else

QCLI_INLINE F32x16 operator/(F32x16 a, F32x16 b) {
  QCLI_LANES(i) a.v[i] /= b.v[i];
  return a;
}
QCLI_INLINE F32x16 maximum(F32x16 a, F32x16 b) {
  QCLI_LANES(i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
QCLI_INLINE F32x16 minimum(F32x16 a, F32x16 b) {
  QCLI_LANES(i) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
QCLI_INLINE F32x16 where_less(F32x16 a, F32x16 b, F32x16 yes, F32x16 no) {
  QCLI_LANES(i) no.v[i] = a.v[i] < b.v[i] ? yes.v[i] : no.v[i];
  return no;
}
QCLI_INLINE F32x16 as_floats(I32x16 x) {
  F32x16 r;
  memcpy(r.v, x.v, 64);
  return r;
}
QCLI_INLINE F32x16 magnitudes(F32x16 x) {
  QCLI_LANES(i) x.v[i] = __builtin_fabsf(x.v[i]);
  return x;
}

#endif

// x where v is a number, else other.
QCLI_INLINE F32x16 where_number(F32x16 v, F32x16 x, F32x16 other) {
  const F32x16 infinity = all(from_bits(kInfinity));
  return where_less(v, infinity, x, where_less(all(0.0f), v, x, other));
}

// The first `count` values, with zeros in the other lanes.
template <class T>
QCLI_INLINE F32x16 load_some(const T* p, int64_t count) {
  if (count >= 16) return load(p);
  T padded[16] = {};
  memcpy(padded, p, count * sizeof(T));
  return load(padded);
}
template <class T>
QCLI_INLINE void store_some(T* p, F32x16 x, int64_t count) {
  if (count >= 16) {
    store(p, x);
    return;
  }
  T padded[16];
  store(padded, x);
  memcpy(p, padded, count * sizeof(T));
}

// NaN counts as the least value.
QCLI_INLINE float max_lanes(F32x16 x) {
  float lanes[16], most = -from_bits(kInfinity);
  store(lanes, x);
  for (int i = 0; i < 16; i++) most = lanes[i] > most ? lanes[i] : most;
  return most;
}

// c[0] x^(kCount - 1) + ... + c[kCount - 1].
template <int kCount>
QCLI_INLINE F32x16 polynomial(F32x16 x, const float (&c)[kCount]) {
  F32x16 sum = all(c[0]);
#pragma GCC unroll 8
  for (int i = 1; i < kCount; i++) sum = sum * x + all(c[i]);
  return sum;
}

// exp(x) for x <= 0, with a relative error below 1.5e-7. Below -87.7 it is 0. NaN stays NaN.
//
// x = n log 2 + r with |r| <= log 2 / 2. Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits. The product of
// n with the high part of log 2 is exact. The polynomial is that of expf in Cephes (Moshier).
QCLI_INLINE F32x16 exp_negative(F32x16 x) {
  const F32x16 limited = maximum(all(-88.0f), x), magic = all(12582912.0f);
  const F32x16 shifted = limited * all(1.44269504f) + magic, n = shifted - magic;
  const F32x16 r = limited - n * all(0.693359375f) - n * all(-2.12194440e-4f);
  const float c[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  const F32x16 power = polynomial(r, c) * (r * r) + r + all(1.0f);
  return power * as_floats(left<23>(as_ints(shifted)) + all(int32_t(0x3f800000)));  // at n = -127 the factor is 0
}

// 1 / (1 + exp(-x)).
QCLI_INLINE F32x16 sigmoid(F32x16 x) {
  const F32x16 zero = all(0.0f), one = all(1.0f), power = exp_negative(zero - magnitudes(x));
  return where_less(x, zero, power, one) / (one + power);
}

// Within 1.5e-7. Near zero the polynomial of tanhf in Cephes keeps the relative error small too.
QCLI_INLINE F32x16 hyperbolic_tangent(F32x16 x) {
  const F32x16 zero = all(0.0f), one = all(1.0f), magnitude = magnitudes(x);
  const F32x16 power = exp_negative(zero - (magnitude + magnitude)), far = (one - power) / (one + power);
  const F32x16 square = x * x;
  const float c[] = {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f};
  const F32x16 near = polynomial(square, c) * square * x + x;
  return where_less(magnitude, all(0.625f), near, where_less(x, zero, zero - far, far));
}

// Within 3e-7: the ratio of two polynomials, that of erf in Eigen and XLA. Beyond 4, |erf| is 1 up to float32's rounding.
QCLI_INLINE F32x16 error_function(F32x16 x) {
  const F32x16 limited = maximum(all(-4.0f), minimum(all(4.0f), x)), square = limited * limited;
  const float above[] = {-2.72614225801306e-10f, 2.77068142495902e-08f, -2.10102402082508e-06f, -5.69250639462346e-05f,
                         -7.34990630326855e-04f, -2.95459980854025e-03f, -1.60960333262415e-02f};
  const float below[] = {-1.45660718464996e-05f, -2.13374055278905e-04f, -1.68282697438203e-03f, -7.37332916720468e-03f,
                         -1.42647390514189e-02f};
  return limited * polynomial(square, above) / polynomial(square, below);
}

}  // namespace
