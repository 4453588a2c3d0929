// Products of 16-bit integers with 4-bit weights, for CPUs with wide integer vectors. A table turns a chunk of 128 codes into four
// vectors of 32 integers, and a multiplication adds two products per lane. Measured from cache, in weights per cycle compared with
// float32: 2.3 times as many with AVX2, 1.2 times with AVX-512 VNNI.
#pragma once

#include "simd.h"

#if defined(__AVX2__)
#define QCLI_INT16_PRODUCTS

namespace {

#if defined(__AVX512F__)

struct I16x32 {
  __m512i v;
};
// The sixteen entries, twice, because look-ups of words read five bits.
struct Codes16 {
  __m512i v;
};
QCLI_INLINE Codes16 codes16(const int16_t* entries) {
  return {_mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(entries)))};
}
// The element of a chunk in word w of vector j.
constexpr int element_of(int j, int w) { return 4 * w + (j ^ 1); }
// Vectors kHalf and kHalf + 2 of a chunk.
template <int kHalf>
QCLI_INLINE void look_up_half(Codes16 codes, I32x16 packed, I16x32 (&weights)[2]) {
  weights[0].v = _mm512_permutexvar_epi16(kHalf ? _mm512_srli_epi32(packed.v, 4) : packed.v, codes.v);
  weights[1].v = _mm512_permutexvar_epi16(_mm512_srli_epi32(packed.v, kHalf ? 12 : 8), codes.v);
}
QCLI_INLINE I16x32 load_words(const int16_t* p) { return {_mm512_loadu_si512(p)}; }
// Adds a[2l] b[2l] + a[2l + 1] b[2l + 1] to lane l.
QCLI_INLINE I32x16 add_dot(I32x16 sum, I16x32 a, I16x32 b) {
#if defined(__AVX512VNNI__)
  return {_mm512_dpwssd_epi32(sum.v, a.v, b.v)};
#else
  return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(a.v, b.v))};
#endif
}

#else

struct I16x32 {
  __m256i a, b;
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
template <int kHalf>
QCLI_INLINE void look_up_nibbles(Codes16 codes, __m256i packed, __m256i* first, __m256i* second) {
  const __m256i nibbles = _mm256_and_si256(kHalf ? _mm256_srli_epi32(packed, 4) : packed, _mm256_set1_epi8(15));
  const __m256i low = _mm256_shuffle_epi8(codes.low, nibbles), high = _mm256_shuffle_epi8(codes.high, nibbles);
  *first = _mm256_unpacklo_epi8(low, high);
  *second = _mm256_unpackhi_epi8(low, high);
}
template <int kHalf>
QCLI_INLINE void look_up_half(Codes16 codes, I32x16 packed, I16x32 (&weights)[2]) {
  look_up_nibbles<kHalf>(codes, packed.a, &weights[0].a, &weights[1].a);
  look_up_nibbles<kHalf>(codes, packed.b, &weights[0].b, &weights[1].b);
}
QCLI_INLINE I16x32 load_words(const int16_t* p) {
  const __m256i* vectors = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(vectors), _mm256_loadu_si256(vectors + 1)};
}
QCLI_INLINE I32x16 add_dot(I32x16 sum, I16x32 x, I16x32 y) {
  return {_mm256_add_epi32(sum.a, _mm256_madd_epi16(x.a, y.a)), _mm256_add_epi32(sum.b, _mm256_madd_epi16(x.b, y.b))};
}

#endif

}  // namespace

#endif
