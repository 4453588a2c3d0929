// Products of 16-bit integers with 4-bit weights, for CPUs with wide integer vectors. A table turns a register of codes into four
// vectors of 16-bit integers, and a multiplication adds two products per lane. The register is as wide as the CPU has: kWide codes.
#pragma once

#include "simd.h"

#if defined(__AVX2__)
#define QCLI_INT16_PRODUCTS

namespace {

#if defined(__AVX512F__)

constexpr int kWide = 128;

// Codes, and those from the next byte on: a load costs less than a shift, whose port look-ups need.
struct Packed {
  __m512i v, next;
};
struct Words {
  __m512i v;
};
struct Sums {
  __m512i v;
};
struct Lanes {
  __m512 v;
};
// The sixteen entries, twice, because look-ups of words read five bits.
struct Codes16 {
  __m512i v;
};
QCLI_INLINE Codes16 codes16(const int16_t* entries) {
  return {_mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(entries)))};
}
// The element of a register's codes in word w of vector j.
constexpr int element_of(int j, int w) { return 4 * w + (j ^ 1); }
QCLI_INLINE Packed load_packed(const uint8_t* p) { return {_mm512_loadu_si512(p), _mm512_loadu_si512(p + 1)}; }
// Vectors kHalf and kHalf + 2.
template <int kHalf>
QCLI_INLINE void look_up_half(const Codes16& codes, Packed packed, Words (&weights)[2]) {
  weights[0].v = _mm512_permutexvar_epi16(kHalf ? _mm512_srli_epi32(packed.v, 4) : packed.v, codes.v);
  weights[1].v = _mm512_permutexvar_epi16(kHalf ? _mm512_srli_epi32(packed.next, 4) : packed.next, codes.v);
}
QCLI_INLINE Words load_words(const int16_t* p) { return {_mm512_loadu_si512(p)}; }
QCLI_INLINE void store_words(int16_t* p, Words x) { _mm512_storeu_si512(p, x.v); }
// to[i] = from[index[i]], in 16 bits.
template <int kCount>
QCLI_INLINE void place_words(const int32_t* from, const uint16_t* index, int16_t* to) {
  if (kCount != 128) {
    for (int i = 0; i < kCount; i++) to[i] = int16_t(from[index[i]]);
    return;
  }
  __m512i words[4];
  for (int j = 0; j < 4; j++) {
    const __m256i low = _mm512_cvtepi32_epi16(_mm512_loadu_si512(from + 32 * j));
    words[j] = _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm512_cvtepi32_epi16(_mm512_loadu_si512(from + 32 * j + 16)), 1);
  }
  for (int j = 0; j < 4; j++) {
    const __m512i at = _mm512_loadu_si512(index + 32 * j);
    const __m512i first = _mm512_permutex2var_epi16(words[0], at, words[1]), second = _mm512_permutex2var_epi16(words[2], at, words[3]);
    _mm512_storeu_si512(to + 32 * j, _mm512_mask_blend_epi16(_mm512_test_epi16_mask(at, _mm512_set1_epi16(64)), first, second));
  }
}
QCLI_INLINE Sums dot(Words a, Words b) { return {_mm512_madd_epi16(a.v, b.v)}; }
// Adds a[2l] b[2l] + a[2l + 1] b[2l + 1] to lane l.
QCLI_INLINE Sums add_dot(Sums sum, Words a, Words b) {
#if defined(__AVX512VNNI__)
  return {_mm512_dpwssd_epi32(sum.v, a.v, b.v)};
#else
  return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(a.v, b.v))};
#endif
}
QCLI_INLINE Lanes no_lanes() { return {_mm512_setzero_ps()}; }
// One scale per 32 elements.
QCLI_INLINE Lanes lanes_of(float a, float b, float c, float d) {
  return {_mm512_set_ps(d, d, d, d, c, c, c, c, b, b, b, b, a, a, a, a)};
}
QCLI_INLINE Lanes lanes_of(float a) { return {_mm512_set1_ps(a)}; }
QCLI_INLINE Lanes times(Lanes a, float b) { return {_mm512_mul_ps(a.v, _mm512_set1_ps(b))}; }
QCLI_INLINE Lanes add_scaled(Lanes total, Sums sums, Lanes scale) {
  return {_mm512_fmadd_ps(_mm512_cvtepi32_ps(sums.v), scale.v, total.v)};
}
QCLI_INLINE Lanes load_lanes(const float* p) { return {_mm512_loadu_ps(p)}; }
QCLI_INLINE Lanes add_product(Lanes total, Lanes a, Lanes b) { return {_mm512_fmadd_ps(a.v, b.v, total.v)}; }
QCLI_INLINE float sum_lanes(Lanes x) { return sum_lanes(F32x16{x.v}); }

#else

constexpr int kWide = 64;

struct Packed {
  __m256i v;
};
struct Words {
  __m256i v;
};
struct Sums {
  __m256i v;
};
struct Lanes {
  __m256 v;
};
// The low and the high bytes of the entries.
struct Codes16 {
  __m256i low, high;
};
QCLI_INLINE Codes16 codes16(const int16_t* entries) {
  int8_t low[16], high[16];
  for (int i = 0; i < 16; i++) {
    low[i] = int8_t(entries[i] & 255);
    high[i] = int8_t(entries[i] >> 8);
  }
  return {_mm256_broadcastsi128_si256(load_sixteen_bytes(low)), _mm256_broadcastsi128_si256(load_sixteen_bytes(high))};
}
// Vector j has bytes 8 (j / 2) + 0..7 of every sixteen; their high nibbles if j is odd.
constexpr int element_of(int j, int w) {
  return 2 * (w / 8 * 16 + j / 2 * 8 + w % 8) + (j % 2 ? 0 : 1);
}
QCLI_INLINE Packed load_packed(const uint8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
template <int kHalf>
QCLI_INLINE void look_up_half(const Codes16& codes, Packed packed, Words (&weights)[2]) {
  const __m256i nibbles = _mm256_and_si256(kHalf ? _mm256_srli_epi32(packed.v, 4) : packed.v, _mm256_set1_epi8(15));
  const __m256i low = _mm256_shuffle_epi8(codes.low, nibbles), high = _mm256_shuffle_epi8(codes.high, nibbles);
  weights[0].v = _mm256_unpacklo_epi8(low, high);
  weights[1].v = _mm256_unpackhi_epi8(low, high);
}
QCLI_INLINE Words load_words(const int16_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
QCLI_INLINE void store_words(int16_t* p, Words x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.v); }
template <int kCount>
QCLI_INLINE void place_words(const int32_t* from, const uint16_t* index, int16_t* to) {
  for (int i = 0; i < kCount; i++) to[i] = int16_t(from[index[i]]);
}
QCLI_INLINE Sums dot(Words a, Words b) { return {_mm256_madd_epi16(a.v, b.v)}; }
QCLI_INLINE Sums add_dot(Sums sum, Words a, Words b) { return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(a.v, b.v))}; }
QCLI_INLINE Lanes no_lanes() { return {_mm256_setzero_ps()}; }
QCLI_INLINE Lanes lanes_of(float a, float b) { return {_mm256_set_m128(_mm_set1_ps(b), _mm_set1_ps(a))}; }
QCLI_INLINE Lanes lanes_of(float a) { return {_mm256_set1_ps(a)}; }
QCLI_INLINE Lanes times(Lanes a, float b) { return {_mm256_mul_ps(a.v, _mm256_set1_ps(b))}; }
QCLI_INLINE Lanes add_scaled(Lanes total, Sums sums, Lanes scale) {
  return {_mm256_fmadd_ps(_mm256_cvtepi32_ps(sums.v), scale.v, total.v)};
}
QCLI_INLINE Lanes load_lanes(const float* p) { return {_mm256_loadu_ps(p)}; }
QCLI_INLINE Lanes add_product(Lanes total, Lanes a, Lanes b) { return {_mm256_fmadd_ps(a.v, b.v, total.v)}; }
QCLI_INLINE float sum_lanes(Lanes x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

#endif

}  // namespace

#endif
