// Codes of 2, 3 and 4 bits in units of 64 columns (pack_planes in qcli/packing.py), brought to one form: "nibbles", in which byte j of
// 32 has column j of a unit in its low half and column j + 32 in its high one, which is how 4 bits are stored. Of 2 bits, the upper
// two bits of a half are not cleared: a table of 16 entries that repeats its four ignores them.
#pragma once

#include "chunks.h"

namespace {

constexpr int64_t kUnit = 64;       // columns
constexpr int64_t kNibbleBytes = 32;  // of a unit
constexpr int64_t unit_bytes(int bits) { return 8 * bits; }

// The order of x for nibbles: of the 16 lanes of two units as look_up finds them, and of the words of look_up_half (int16.h).
struct PlaneOrder {
  static constexpr int of_nibble(int byte, int half) { return 64 * (byte / 32) + byte % 32 + 32 * half; }
  static constexpr int element_at(int place) {
    return of_nibble(4 * (place % 16) + place / 32, place / 16 % 2);
  }
#if defined(QCLI_INT16_PRODUCTS)
  static constexpr int word_at(int place) {
    const int vector = place / (kWide / 4), w = place % (kWide / 4);
    // look_up_half<h> gives vectors h and h + 2.
#if defined(__AVX512F__)
    return of_nibble(2 * w + vector / 2, vector % 2);
#else
    return of_nibble(w / 8 * 16 + vector / 2 * 8 + w % 8, vector % 2);
#endif
  }
#endif
};

// The code of a column of a row.
template <int kBits>
QCLI_INLINE int code_at(const uint8_t* row, int64_t column) {
  const uint8_t* unit = row + column / kUnit * unit_bytes(kBits);
  const int c = int(column % kUnit);
  if (kBits == 4) return unit[c % 32] >> (c / 32 * 4) & 15;
  const int low = unit[c % 16] >> (c / 16 * 2) & 3;
  return kBits == 3 ? low | (unit[16 + c / 8] >> c % 8 & 1) << 2 : low;
}

// A table of 2^bits entries as one of 16.
template <int kBits>
QCLI_INLINE void repeat_table(const float* table, float* entries) {
  for (int i = 0; i < 16; i++) entries[i] = table[i & ((1 << kBits) - 1)];
}

#if defined(__AVX512F__)

// Two units.
template <int kBits>
QCLI_INLINE __m512i nibbles_of_two(const uint8_t* p) {
  if (kBits == 4) return _mm512_loadu_si512(p);
  const __m512i shifts = _mm512_set_epi64(2, 2, 0, 0, 2, 2, 0, 0);
  if (kBits == 2) {
    const __m512i units = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_srlv_epi64(_mm512_permutexvar_epi64(_mm512_set_epi64(3, 2, 3, 2, 1, 0, 1, 0), units), shifts);
  }
  const __m512i units = _mm512_maskz_loadu_epi64(0x3f, p);
  const __m512i low = _mm512_srlv_epi64(_mm512_permutexvar_epi64(_mm512_set_epi64(4, 3, 4, 3, 1, 0, 1, 0), units), shifts);
  const __m512i third = _mm512_permutexvar_epi64(_mm512_set_epi64(5, 5, 5, 5, 2, 2, 2, 2), units);
  // Byte j of a unit: the byte that has bit j, and the one that has bit j + 32.
  const __m512i eights = _mm512_set_epi64(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0, 0x0303030303030303,
                                          0x0202020202020202, 0x0101010101010101, 0);
  const __m512i bits = _mm512_set1_epi64(int64_t(0x8040201008040201));
  const __mmask64 first = _mm512_test_epi8_mask(_mm512_shuffle_epi8(third, eights), bits);
  const __mmask64 second =
      _mm512_test_epi8_mask(_mm512_shuffle_epi8(third, _mm512_add_epi8(eights, _mm512_set1_epi8(4))), bits);
  __m512i codes = _mm512_and_si512(low, _mm512_set1_epi8(0x33));
  codes = _mm512_mask_add_epi8(codes, first, codes, _mm512_set1_epi8(4));
  return _mm512_mask_add_epi8(codes, second, codes, _mm512_set1_epi8(0x40));
}
template <int kBits>
QCLI_INLINE I32x16 nibbles(const uint8_t* p) {
  return {nibbles_of_two<kBits>(p)};
}
template <int kBits>
QCLI_INLINE Packed packed_nibbles(const uint8_t* p) {
  return {nibbles_of_two<kBits>(p)};
}
template <int kBits>
QCLI_INLINE void store_nibbles(const uint8_t* p, uint8_t* to) {
  _mm512_storeu_si512(to, nibbles_of_two<kBits>(p));
}

#elif defined(__AVX2__)

template <int kBits>
QCLI_INLINE __m256i nibbles_of_one(const uint8_t* p) {
  if (kBits == 4) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i unit = _mm256_broadcastsi128_si256(load_sixteen_bytes(p));
  const __m256i low = _mm256_srlv_epi64(unit, _mm256_set_epi64x(2, 2, 0, 0));
  if (kBits == 2) return low;
  int64_t eight;
  memcpy(&eight, p + 16, 8);
  const __m256i third = _mm256_set1_epi64x(eight);
  const __m256i eights = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
  const __m256i bits = _mm256_set1_epi64x(int64_t(0x8040201008040201));
  const __m256i first = _mm256_and_si256(_mm256_shuffle_epi8(third, eights), bits);
  const __m256i second = _mm256_and_si256(_mm256_shuffle_epi8(third, _mm256_add_epi8(eights, _mm256_set1_epi8(4))), bits);
  const __m256i codes = _mm256_and_si256(low, _mm256_set1_epi8(0x33));
  const __m256i of_first = _mm256_and_si256(_mm256_cmpeq_epi8(first, bits), _mm256_set1_epi8(4));
  const __m256i of_second = _mm256_and_si256(_mm256_cmpeq_epi8(second, bits), _mm256_set1_epi8(0x40));
  return _mm256_or_si256(_mm256_or_si256(codes, of_first), of_second);
}
template <int kBits>
QCLI_INLINE I32x16 nibbles(const uint8_t* p) {
  return {nibbles_of_one<kBits>(p), nibbles_of_one<kBits>(p + unit_bytes(kBits))};
}
template <int kBits>
QCLI_INLINE Packed packed_nibbles(const uint8_t* p) {
  return {nibbles_of_one<kBits>(p)};
}
template <int kBits>
QCLI_INLINE void store_nibbles(const uint8_t* p, uint8_t* to) {
  const I32x16 found = nibbles<kBits>(p);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), found.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to) + 1, found.b);
}

#else

// Bit i of a byte as the lowest bit of byte i.
QCLI_INLINE uint64_t spread(uint8_t byte) {
  const uint64_t bits = (byte * 0x0101010101010101ull & 0x8040201008040201ull) + 0x00406070787c7e7full;
  return bits >> 7 & 0x0101010101010101ull;
}
template <int kBits>
QCLI_INLINE void store_nibbles(const uint8_t* p, uint8_t* to) {
  for (int unit = 0; unit < 2; unit++, p += unit_bytes(kBits), to += kNibbleBytes) {
    if (kBits == 4) {
      memcpy(to, p, kNibbleBytes);
      continue;
    }
    for (int part = 0; part < 4; part++) {
      uint64_t eight;
      memcpy(&eight, p + part % 2 * 8, 8);
      eight = eight >> (part / 2 * 2) & 0x3333333333333333ull;
      if (kBits == 3) eight |= spread(p[16 + part]) << 2 | spread(p[20 + part]) << 6;
      memcpy(to + 8 * part, &eight, 8);
    }
  }
}
template <int kBits>
QCLI_INLINE I32x16 nibbles(const uint8_t* p) {
  uint8_t bytes[2 * kNibbleBytes];
  store_nibbles<kBits>(p, bytes);
  return load_ints(bytes);
}

#endif

// The 64 values of a unit in nibbles, in order.
QCLI_INLINE void values_of_unit(const uint8_t* unit, Table16 table, F32x16 (&values)[4]) {
  for (int i = 0; i < 2; i++) {
    const I32x16 bytes = load_bytes(unit + 16 * i);
    values[i] = look_up<0>(table, bytes);
    values[2 + i] = look_up<4>(table, bytes);
  }
}

// Calls with(columns, count, values) for every sixteen columns of a row of k columns, the last count of which is k % 16 if that is not
// zero. `row` may be read up to the end of its last unit.
template <int kBits, class With>
QCLI_INLINE void each_sixteen(const uint8_t* row, int64_t k, Table16 table, With with) {
  constexpr int64_t bytes = unit_bytes(kBits);
  for (int64_t i = 0; i < k; i += 2 * kUnit) {
    uint8_t two[2 * unit_bytes(4)], unpacked[2 * kNibbleBytes];
    const uint8_t* from = row + i / kUnit * bytes;
    if (k - i <= kUnit) {  // the second unit is not there
      memset(two + bytes, 0, bytes);
      from = static_cast<const uint8_t*>(memcpy(two, from, bytes));
    }
    store_nibbles<kBits>(from, unpacked);
    for (int unit = 0; unit < 2; unit++) {
      F32x16 values[4];
      values_of_unit(unpacked + unit * kNibbleBytes, table, values);
      for (int j = 0; j < 4; j++) {
        const int64_t column = i + unit * kUnit + 16 * j;
        if (column < k) with(column, smaller<int64_t>(16, k - column), values[j]);
      }
    }
  }
}

}  // namespace
