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
  const __m512i codes = nibbles_of_two<kBits>(p);
  return {codes, _mm512_srli_epi32(codes, 8)};
}
template <int kBits>
QCLI_INLINE void store_nibbles(const uint8_t* p, uint8_t* to) {
  _mm512_storeu_si512(to, nibbles_of_two<kBits>(p));
}

// Four units of 2 or 3 bits in one register, without the way through nibbles: looking up words reads five bits of an index, so two
// codes that lie side by side need no shift, but a table each. With 3 bits the third ones are laid beside them: for the first and the
// third sixteen columns at bits 2 and 3 of an index, for the even and the odd column of a word, and for the others at bits 0 and 1.
constexpr int64_t kFour = 4 * kUnit;
struct FourOrder {
  // Vector 2 p + odd has, of every unit, the odd or even columns of its p-th sixteen.
  static constexpr int word_at(int place) {
    const int vector = place / 32, w = place % 32;
    return w / 8 * 64 + vector / 2 * 16 + w % 8 * 2 + vector % 2;
  }
};
// Where the index of a vector has the third bit, by p % 2 and odd.
constexpr int third_place(int p, int odd) { return (p % 2 ? 0 : 2) + odd; }

struct FourTables {
  __m512i v[4];  // by p % 2 and odd
};
// Which entry of a table of 16 an index names.
template <int kBits>
struct FourIndex {
  int16_t at[4][32];
  constexpr FourIndex() : at() {
    for (int i = 0; i < 4; i++) {
      for (int w = 0; w < 32; w++) {
        const int code = w >> (i / 2 ? 2 : 0) & 3;
        at[i][w] = int16_t(kBits == 3 ? code | (w >> third_place(i / 2, i % 2) & 1) << 2 : code);
      }
    }
  }
};
template <int kBits>
QCLI_INLINE FourTables four_tables(__m256i entries) {
  const __m512i table = _mm512_broadcast_i64x4(entries);
  static constexpr FourIndex<kBits> index;
  FourTables found;
  for (int i = 0; i < 4; i++) found.v[i] = _mm512_permutexvar_epi16(_mm512_loadu_si512(index.at[i]), table);
  return found;
}

// Calls with(vector, words) for the eight vectors of words of four units.
template <int kBits, class With>
QCLI_INLINE void look_up_four(const uint8_t* p, const FourTables& tables, With with) {
  __m512i low = _mm512_loadu_si512(p), third[2] = {low, low};
  if (kBits == 3) {
    const __m512i rest = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 64)));
    const __m512i high = _mm512_permutex2var_epi64(low, _mm512_set_epi64(11, 11, 8, 8, 5, 5, 2, 2), rest);
    low = _mm512_permutex2var_epi64(low, _mm512_set_epi64(10, 9, 7, 6, 4, 3, 1, 0), rest);
    // In word i of a unit: the bytes with bits 2 i and 2 i + 1 of sixteen columns, and of those 32 columns behind them.
    const __m512i bytes = _mm512_set4_epi32(0x05010501, 0x05010501, 0x04000400, 0x04000400);
    const __m512i shifts = _mm512_set4_epi32(0x00060004, 0x00020000, 0x00060004, 0x00020000);
    third[0] = _mm512_slli_epi16(_mm512_srlv_epi16(_mm512_shuffle_epi8(high, bytes), shifts), 2);
    third[1] = _mm512_srlv_epi16(_mm512_shuffle_epi8(high, _mm512_add_epi8(bytes, _mm512_set1_epi8(2))), shifts);
  }
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++) {  // p and p + 2
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; odd++) {
      const __m512i codes = half || odd ? _mm512_srli_epi16(low, 4 * half + 8 * odd) : low;
#pragma GCC unroll 2
      for (int p = 0; p < 2; p++) {
        __m512i index = codes;
        if (kBits == 3) {
          const __m512i bit = _mm512_set1_epi16(int16_t(1 << third_place(p, odd)));
          index = _mm512_ternarylogic_epi32(bit, half ? _mm512_srli_epi16(third[p], 8) : third[p], codes, 0xca);  // bit ? third : code
        }
        with(4 * half + 2 * p + odd, Words{_mm512_permutexvar_epi16(index, tables.v[2 * p + odd])});
      }
    }
  }
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
