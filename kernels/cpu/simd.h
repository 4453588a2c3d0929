// Sixteen lanes: one AVX-512 register, two of AVX2, or an array that the compiler may vectorize. Every variant adds in the same
// order, so sums have the same bits.
#pragma once

#include "common.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX2__)
QCLI_INLINE __m128i load_sixteen_bytes(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
// Sixteen values of E4M3 as float16, without kE4M3Unit: sign extension and a shift by 7 move the bits, and leave the sign twice.
QCLI_INLINE __m256i e4m3_as_halves(const e4m3* p) {
  const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(load_sixteen_bytes(p)), 7);
  return _mm256_and_si256(wide, _mm256_set1_epi16(int16_t(0xbfff)));
}
#endif

#if defined(__AVX512F__)

struct F32x16 {
  __m512 v;
};
struct I32x16 {
  __m512i v;
};

QCLI_INLINE F32x16 all(float x) { return {_mm512_set1_ps(x)}; }
QCLI_INLINE I32x16 all(int32_t x) { return {_mm512_set1_epi32(x)}; }
// Lanes 0-7 from a, 8-15 from b.
QCLI_INLINE F32x16 halves(float a, float b) {
  return {_mm512_mask_broadcastss_ps(_mm512_set1_ps(a), 0xff00, _mm_set_ss(b))};
}
QCLI_INLINE F32x16 quarters(const float* x) {
  __m512 v = _mm512_mask_broadcastss_ps(_mm512_set1_ps(x[0]), 0x00f0, _mm_set_ss(x[1]));
  v = _mm512_mask_broadcastss_ps(v, 0x0f00, _mm_set_ss(x[2]));
  return {_mm512_mask_broadcastss_ps(v, 0xf000, _mm_set_ss(x[3]))};
}
// Two lanes of each of eight.
QCLI_INLINE F32x16 eighths(const float* x) {
  const __m512i pairs = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  return {_mm512_permutexvar_ps(pairs, _mm512_castps256_ps512(_mm256_loadu_ps(x)))};
}
QCLI_INLINE F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
QCLI_INLINE F32x16 load(const bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
QCLI_INLINE F32x16 load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
QCLI_INLINE F32x16 load(const e4m3* p) { return {_mm512_cvtph_ps(e4m3_as_halves(p))}; }
QCLI_INLINE F32x16 load(const e8m0* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(load_sixteen_bytes(p)), 23))};
}
QCLI_INLINE F32x16 load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_sixteen_bytes(p)))};
}
QCLI_INLINE I32x16 load_ints(const void* p) { return {_mm512_loadu_si512(p)}; }
// Sixteen bytes, one per lane.
QCLI_INLINE I32x16 load_bytes(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(load_sixteen_bytes(p))};
}
QCLI_INLINE void store(float* p, F32x16 x) { _mm512_storeu_ps(p, x.v); }
QCLI_INLINE void store_ints(int32_t* p, I32x16 x) { _mm512_storeu_si512(p, x.v); }
QCLI_INLINE void store(bf16* p, F32x16 x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  rounded = _mm512_mask_set1_epi32(rounded, _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), 0x7fc00000);
  const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
}
QCLI_INLINE void store(f16* p, F32x16 x) {
  const __m256i bits = _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
}
QCLI_INLINE void store_bytes(int8_t* p, I32x16 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x.v));
}
QCLI_INLINE void store_bytes(uint8_t* p, I32x16 x) { store_bytes(reinterpret_cast<int8_t*>(p), x); }
QCLI_INLINE F32x16 operator+(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
QCLI_INLINE F32x16 operator-(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
QCLI_INLINE F32x16 operator*(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
QCLI_INLINE F32x16 fused(F32x16 a, F32x16 b, F32x16 sum) { return {_mm512_fmadd_ps(a.v, b.v, sum.v)}; }
QCLI_INLINE I32x16 operator+(I32x16 a, I32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
QCLI_INLINE I32x16 operator|(I32x16 a, I32x16 b) { return {_mm512_or_si512(a.v, b.v)}; }
QCLI_INLINE I32x16 operator-(I32x16 a, I32x16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
QCLI_INLINE I32x16 operator&(I32x16 a, I32x16 b) { return {_mm512_and_si512(a.v, b.v)}; }
template <int kBits>
QCLI_INLINE I32x16 left(I32x16 a) {
  return {_mm512_slli_epi32(a.v, kBits)};
}
// Zeros come in from the left.
template <int kBits>
QCLI_INLINE I32x16 right(I32x16 a) {
  return {_mm512_srli_epi32(a.v, kBits)};
}
// The table entries at the low four bits of each index. Higher bits are ignored.
struct Table16 {
  __m512 v;
};
QCLI_INLINE Table16 table16(const float* entries) { return {_mm512_loadu_ps(entries)}; }
template <int kShift>
QCLI_INLINE F32x16 look_up(Table16 table, I32x16 index) {
  return {_mm512_permutexvar_ps(kShift ? _mm512_srli_epi32(index.v, kShift) : index.v, table.v)};
}
QCLI_INLINE I32x16 plus_greater(I32x16 sum, F32x16 a, F32x16 b) {
  return {_mm512_mask_add_epi32(sum.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), sum.v, _mm512_set1_epi32(1))};
}
QCLI_INLINE F32x16 gather(const float* base, I32x16 index) { return {_mm512_i32gather_ps(index.v, base, 4)}; }

// A table of 256 values. Where there are 32 registers, permutes find its entries: twice as fast as a gather on AMD's processors.
struct Table256 {
  F32x16 part[16];
};
QCLI_INLINE Table256 table256(const float* values) {
  Table256 table;
  for (int i = 0; i < 16; i++) table.part[i] = load(values + 16 * i);
  return table;
}
// Entries for indices of 0 to 255.
QCLI_INLINE F32x16 look_up(const Table256& table, I32x16 index) {
  __m512 found[8];  // by the lowest five bits
  for (int i = 0; i < 8; i++) {
    found[i] = _mm512_permutex2var_ps(table.part[2 * i].v, index.v, table.part[2 * i + 1].v);
  }
  for (int bit = 5, count = 4; bit < 8; bit++, count /= 2) {
    const __mmask16 set = _mm512_test_epi32_mask(index.v, _mm512_set1_epi32(1 << bit));
    for (int i = 0; i < count; i++) found[i] = _mm512_mask_blend_ps(set, found[2 * i], found[2 * i + 1]);
  }
  return {found[0]};
}
QCLI_INLINE I32x16 rounded(F32x16 x) { return {_mm512_cvtps_epi32(x.v)}; }  // to nearest, ties to even
QCLI_INLINE I32x16 as_ints(F32x16 x) { return {_mm512_castps_si512(x.v)}; }
QCLI_INLINE F32x16 floats(I32x16 x) { return {_mm512_cvtepi32_ps(x.v)}; }
// Packs every two lanes into a byte of two codes, the earlier in the high nibble.
QCLI_INLINE void store_codes(uint8_t* p, I32x16 codes) {
  const __m512i pairs = _mm512_or_si512(_mm512_slli_epi64(codes.v, 4), _mm512_srli_epi64(codes.v, 32));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm512_cvtepi64_epi8(pairs));
}
// a0 b0 a1 b1 ...: 32 values in two vectors.
QCLI_INLINE void interleave(F32x16 a, F32x16 b, F32x16* first, F32x16* second) {
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
  first->v = _mm512_permutex2var_ps(a.v, low, b.v);
  second->v = _mm512_permutex2var_ps(a.v, high, b.v);
}
QCLI_INLINE float sum_lanes(F32x16 x) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
QCLI_INLINE F32x16 magnitudes(F32x16 x) { return {_mm512_abs_ps(x.v)}; }
// x with its sign turned in the lanes where `sign` is negative.
QCLI_INLINE F32x16 turned(F32x16 x, F32x16 sign) {
  const __m512i bit = _mm512_set1_epi32(INT32_MIN);
  return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(x.v), _mm512_castps_si512(sign.v), bit, 0x78))};
}

#elif defined(__AVX2__)

struct F32x16 {
  __m256 a, b;
};
struct I32x16 {
  __m256i a, b;
};

QCLI_INLINE F32x16 all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
QCLI_INLINE I32x16 all(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
QCLI_INLINE F32x16 halves(float a, float b) { return {_mm256_set1_ps(a), _mm256_set1_ps(b)}; }
QCLI_INLINE F32x16 quarters(const float* x) {
  return {_mm256_set_m128(_mm_set1_ps(x[1]), _mm_set1_ps(x[0])), _mm256_set_m128(_mm_set1_ps(x[3]), _mm_set1_ps(x[2]))};
}
QCLI_INLINE F32x16 eighths(const float* x) {
  const __m256 v = _mm256_loadu_ps(x);
  return {_mm256_permutevar8x32_ps(v, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3)),
          _mm256_permutevar8x32_ps(v, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7))};
}
QCLI_INLINE F32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
QCLI_INLINE __m256 widen(const bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_sixteen_bytes(p)), 16));
}
QCLI_INLINE F32x16 load(const bf16* p) { return {widen(p), widen(p + 8)}; }
QCLI_INLINE F32x16 load(const f16* p) { return {_mm256_cvtph_ps(load_sixteen_bytes(p)), _mm256_cvtph_ps(load_sixteen_bytes(p + 8))}; }
QCLI_INLINE F32x16 load(const e8m0* p) {
  const __m128i bytes = load_sixteen_bytes(p);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(bytes), 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)), 23))};
}
QCLI_INLINE F32x16 load(const e4m3* p) {
  const __m256i halves = e4m3_as_halves(p);
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
}
QCLI_INLINE F32x16 load(const int8_t* p) {
  const __m128i bytes = load_sixteen_bytes(p);
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
QCLI_INLINE I32x16 load_ints(const void* p) {
  const __m256i* vectors = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(vectors), _mm256_loadu_si256(vectors + 1)};
}
QCLI_INLINE I32x16 load_bytes(const uint8_t* p) {
  const __m128i bytes = load_sixteen_bytes(p);
  return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
QCLI_INLINE void store(float* p, F32x16 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
QCLI_INLINE void store_ints(int32_t* p, I32x16 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.b);
}
QCLI_INLINE __m256i rounded_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
  const __m256 chosen = _mm256_blendv_ps(_mm256_castsi256_ps(sum), nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_castps_si256(chosen), 16);
}
QCLI_INLINE void store(bf16* p, F32x16 x) {
  const __m256i packed = _mm256_packus_epi32(rounded_bf16(x.a), rounded_bf16(x.b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
QCLI_INLINE void store(f16* p, F32x16 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
QCLI_INLINE void store_bytes(int8_t* p, I32x16 x) {  // values within int8
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
QCLI_INLINE void store_bytes(uint8_t* p, I32x16 x) {  // values within uint8
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xd8);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
QCLI_INLINE F32x16 operator+(F32x16 x, F32x16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
QCLI_INLINE F32x16 operator-(F32x16 x, F32x16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
QCLI_INLINE F32x16 operator*(F32x16 x, F32x16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
QCLI_INLINE F32x16 fused(F32x16 x, F32x16 y, F32x16 sum) {
  return {_mm256_fmadd_ps(x.a, y.a, sum.a), _mm256_fmadd_ps(x.b, y.b, sum.b)};
}
QCLI_INLINE I32x16 operator+(I32x16 x, I32x16 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
QCLI_INLINE I32x16 operator|(I32x16 x, I32x16 y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
QCLI_INLINE I32x16 operator-(I32x16 x, I32x16 y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
QCLI_INLINE I32x16 operator&(I32x16 x, I32x16 y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
template <int kBits>
QCLI_INLINE I32x16 left(I32x16 x) {
  return {_mm256_slli_epi32(x.a, kBits), _mm256_slli_epi32(x.b, kBits)};
}
template <int kBits>
QCLI_INLINE I32x16 right(I32x16 x) {
  return {_mm256_srli_epi32(x.a, kBits), _mm256_srli_epi32(x.b, kBits)};
}
struct Table16 {
  __m256 low, high;
};
QCLI_INLINE Table16 table16(const float* entries) { return {_mm256_loadu_ps(entries), _mm256_loadu_ps(entries + 8)}; }
template <int kShift>
QCLI_INLINE __m256 look_up_eight(Table16 table, __m256i index) {
  const __m256i low = kShift ? _mm256_srli_epi32(index, kShift) : index;  // only its low three bits are read
  const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28 - kShift));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, low), _mm256_permutevar8x32_ps(table.high, low), bit3);
}
template <int kShift>
QCLI_INLINE F32x16 look_up(Table16 table, I32x16 index) {
  return {look_up_eight<kShift>(table, index.a), look_up_eight<kShift>(table, index.b)};
}
QCLI_INLINE __m256i plus_greater(__m256i sum, __m256 a, __m256 b) {
  return _mm256_sub_epi32(sum, _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
}
QCLI_INLINE I32x16 plus_greater(I32x16 sum, F32x16 x, F32x16 y) {
  return {plus_greater(sum.a, x.a, y.a), plus_greater(sum.b, x.b, y.b)};
}
QCLI_INLINE F32x16 gather(const float* base, I32x16 index) {
  return {_mm256_i32gather_ps(base, index.a, 4), _mm256_i32gather_ps(base, index.b, 4)};
}

struct Table256 {
  const float* values;
};
QCLI_INLINE Table256 table256(const float* values) { return {values}; }
QCLI_INLINE F32x16 look_up(const Table256& table, I32x16 index) { return gather(table.values, index); }
QCLI_INLINE I32x16 rounded(F32x16 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
QCLI_INLINE I32x16 as_ints(F32x16 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
QCLI_INLINE F32x16 floats(I32x16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
QCLI_INLINE int32_t codes_of_eight(__m256i codes) {
  const __m256i pairs = _mm256_or_si256(_mm256_slli_epi64(codes, 4), _mm256_srli_epi64(codes, 32));
  const __m256i first = _mm256_shuffle_epi8(
      pairs, _mm256_setr_epi8(0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 8, -1, -1, -1, -1,
                              -1, -1, -1, -1, -1, -1, -1, -1));
  return _mm_cvtsi128_si32(_mm_or_si128(_mm256_castsi256_si128(first), _mm256_extracti128_si256(first, 1)));
}
QCLI_INLINE void store_codes(uint8_t* p, I32x16 codes) {
  const int32_t bytes[2] = {codes_of_eight(codes.a), codes_of_eight(codes.b)};
  memcpy(p, bytes, 8);
}
QCLI_INLINE void interleave(F32x16 x, F32x16 y, F32x16* first, F32x16* second) {
  const __m256 a = _mm256_unpacklo_ps(x.a, y.a), b = _mm256_unpackhi_ps(x.a, y.a);
  const __m256 c = _mm256_unpacklo_ps(x.b, y.b), d = _mm256_unpackhi_ps(x.b, y.b);
  *first = {_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)};
  *second = {_mm256_permute2f128_ps(c, d, 0x20), _mm256_permute2f128_ps(c, d, 0x31)};
}
QCLI_INLINE float sum_lanes(F32x16 x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
QCLI_INLINE F32x16 magnitudes(F32x16 x) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(x.a, mask), _mm256_and_ps(x.b, mask)};
}
QCLI_INLINE F32x16 turned(F32x16 x, F32x16 sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_xor_ps(x.a, _mm256_and_ps(sign.a, bit)), _mm256_xor_ps(x.b, _mm256_and_ps(sign.b, bit))};
}

#else

struct F32x16 {
  float v[16];
};
struct I32x16 {
  int32_t v[16];
};

#define QCLI_LANES(i) for (int i = 0; i < 16; i++)

QCLI_INLINE F32x16 all(float x) {
  F32x16 r;
  QCLI_LANES(i) r.v[i] = x;
  return r;
}
QCLI_INLINE I32x16 all(int32_t x) {
  I32x16 r;
  QCLI_LANES(i) r.v[i] = x;
  return r;
}
QCLI_INLINE F32x16 halves(float a, float b) {
  F32x16 r;
  QCLI_LANES(i) r.v[i] = i < 8 ? a : b;
  return r;
}
QCLI_INLINE F32x16 eighths(const float* x) {
  F32x16 r;
  QCLI_LANES(i) r.v[i] = x[i / 2];
  return r;
}
QCLI_INLINE F32x16 quarters(const float* x) {
  F32x16 r;
  QCLI_LANES(i) r.v[i] = x[i / 4];
  return r;
}
template <class T>
QCLI_INLINE F32x16 load(const T* p) {
  F32x16 r;
  QCLI_LANES(i) r.v[i] = to_float(p[i]);
  return r;
}
QCLI_INLINE F32x16 load(const int8_t* p) {
  F32x16 r;
  QCLI_LANES(i) r.v[i] = float(p[i]);
  return r;
}
QCLI_INLINE I32x16 load_ints(const void* p) {
  I32x16 r;
  memcpy(r.v, p, 64);
  return r;
}
QCLI_INLINE I32x16 load_bytes(const uint8_t* p) {
  I32x16 r;
  QCLI_LANES(i) r.v[i] = p[i];
  return r;
}
template <class T>
QCLI_INLINE void store(T* p, F32x16 x) {
  QCLI_LANES(i) from_float(x.v[i], &p[i]);
}
template <class Byte>
QCLI_INLINE void store_bytes(Byte* p, I32x16 x) {
  QCLI_LANES(i) p[i] = Byte(x.v[i]);
}
QCLI_INLINE F32x16 operator+(F32x16 a, F32x16 b) {
  QCLI_LANES(i) a.v[i] += b.v[i];
  return a;
}
QCLI_INLINE F32x16 operator-(F32x16 a, F32x16 b) {
  QCLI_LANES(i) a.v[i] -= b.v[i];
  return a;
}
QCLI_INLINE F32x16 operator*(F32x16 a, F32x16 b) {
  QCLI_LANES(i) a.v[i] *= b.v[i];
  return a;
}
QCLI_INLINE F32x16 fused(F32x16 a, F32x16 b, F32x16 sum) {
#if defined(__FP_FAST_FMAF)
  QCLI_LANES(i) sum.v[i] = __builtin_fmaf(a.v[i], b.v[i], sum.v[i]);
#else
  QCLI_LANES(i) sum.v[i] += a.v[i] * b.v[i];
#endif
  return sum;
}
QCLI_INLINE I32x16 operator+(I32x16 a, I32x16 b) {
  QCLI_LANES(i) a.v[i] += b.v[i];
  return a;
}
QCLI_INLINE I32x16 operator|(I32x16 a, I32x16 b) {
  QCLI_LANES(i) a.v[i] |= b.v[i];
  return a;
}
QCLI_INLINE I32x16 operator-(I32x16 a, I32x16 b) {
  QCLI_LANES(i) a.v[i] = int32_t(uint32_t(a.v[i]) - uint32_t(b.v[i]));
  return a;
}
QCLI_INLINE I32x16 operator&(I32x16 a, I32x16 b) {
  QCLI_LANES(i) a.v[i] &= b.v[i];
  return a;
}
template <int kBits>
QCLI_INLINE I32x16 left(I32x16 a) {
  QCLI_LANES(i) a.v[i] = int32_t(uint32_t(a.v[i]) << kBits);
  return a;
}
template <int kBits>
QCLI_INLINE I32x16 right(I32x16 a) {
  QCLI_LANES(i) a.v[i] = int32_t(uint32_t(a.v[i]) >> kBits);
  return a;
}
struct Table16 {
  const float* entries;
};
QCLI_INLINE Table16 table16(const float* entries) { return {entries}; }
template <int kShift>
QCLI_INLINE F32x16 look_up(Table16 table, I32x16 index) {
  F32x16 r;
  QCLI_LANES(i) r.v[i] = table.entries[uint32_t(index.v[i]) >> kShift & 15];
  return r;
}
QCLI_INLINE I32x16 plus_greater(I32x16 sum, F32x16 a, F32x16 b) {
  QCLI_LANES(i) sum.v[i] += a.v[i] > b.v[i];
  return sum;
}
QCLI_INLINE F32x16 gather(const float* base, I32x16 index) {
  F32x16 r;
  QCLI_LANES(i) r.v[i] = base[index.v[i]];
  return r;
}

struct Table256 {
  const float* values;
};
QCLI_INLINE Table256 table256(const float* values) { return {values}; }
QCLI_INLINE F32x16 look_up(const Table256& table, I32x16 index) { return gather(table.values, index); }
QCLI_INLINE I32x16 rounded(F32x16 x) {
  I32x16 r;
  // Values beyond int32 give the same result as the vector instructions.
  QCLI_LANES(i) r.v[i] = __builtin_fabsf(x.v[i]) < 0x1p31f ? int32_t(nearbyintf(x.v[i])) : INT32_MIN;
  return r;
}
QCLI_INLINE I32x16 as_ints(F32x16 x) {
  I32x16 r;
  memcpy(r.v, x.v, 64);
  return r;
}
QCLI_INLINE F32x16 floats(I32x16 x) {
  F32x16 r;
  QCLI_LANES(i) r.v[i] = float(x.v[i]);
  return r;
}
QCLI_INLINE void store_codes(uint8_t* p, I32x16 codes) {
  for (int i = 0; i < 8; i++) p[i] = uint8_t(codes.v[2 * i] << 4 | codes.v[2 * i + 1]);
}
QCLI_INLINE void interleave(F32x16 a, F32x16 b, F32x16* first, F32x16* second) {
  for (int i = 0; i < 8; i++) {
    first->v[2 * i] = a.v[i];
    first->v[2 * i + 1] = b.v[i];
    second->v[2 * i] = a.v[8 + i];
    second->v[2 * i + 1] = b.v[8 + i];
  }
}
QCLI_INLINE float sum_lanes(F32x16 x) {
  for (int width = 8; width; width /= 2) {
    for (int i = 0; i < width; i++) x.v[i] += x.v[i + width];
  }
  return x.v[0];
}
QCLI_INLINE F32x16 turned(F32x16 x, F32x16 sign) {
  QCLI_LANES(i) x.v[i] = sign.v[i] < 0 ? -x.v[i] : x.v[i];
  return x;
}

#endif

// The number of entries of `tree` below each lane. `tree` has 15 ascending thresholds in the order of a binary search: the children
// of node i are 2 i and 2 i + 1, from 1 on. A NaN is above none.
struct Search16 {
  float tree[16];
};
QCLI_INLINE Search16 search16(const float* ascending) {
  Search16 search = {};
  for (int node = 1; node < 16; node++) {
    int depth = 0;
    while (node >> (depth + 1)) depth++;
    const int place = node - (1 << depth);                          // from the left, on its level
    search.tree[node] = ascending[((2 * place + 1) << (3 - depth)) - 1];
  }
  return search;
}
QCLI_INLINE I32x16 rank16(Table16 tree, F32x16 v) {
  I32x16 node = plus_greater(all(int32_t(2)), v, look_up<0>(tree, all(int32_t(1))));
  for (int level = 0; level < 3; level++) node = plus_greater(node + node, v, look_up<0>(tree, node));
  return node + all(int32_t(-16));
}

}  // namespace
