// Codes of a few bits into 32-bit words, in the layouts of qcli/ops/pack_codes.py.
//
// Eight codes of b bits are b whole bytes of a stream that begins in the low bits: three steps in a 64-bit word close the gaps between
// them. What is stored transposed is made in tiles of a few rows of words, which stay in L1 or L2.

#include "common.h"

namespace {

enum Layout : int { kRows = 0, kColumns = 1, kAwq = 2, kPlanes = 3 };
constexpr int64_t kTile = 16;  // rows of words that are transposed together: a cache line of the result

// Eight codes, a byte each, become b bytes. `offset` is the highest of b bits in each byte, which it flips, or 0: that adds 2^(b-1) to
// signed codes.
template <int kBits>
QCLI_INLINE uint64_t squeeze(uint64_t x, uint64_t offset) {
  constexpr uint64_t kLow = 0x0101010101010101u * ((1u << kBits) - 1);
  x = (x & kLow) ^ offset;
  if (kBits == 8) return x;
  constexpr uint64_t kTwo = (uint64_t(1) << (2 * kBits)) - 1, kFour = (uint64_t(1) << (4 * kBits)) - 1;
  x = (x | x >> (8 - kBits)) & kTwo * 0x0001000100010001u;
  x = (x | x >> (2 * (8 - kBits))) & kFour * 0x0000000100000001u;
  return x | x >> (4 * (8 - kBits));
}

// A row of codes into words [ceil(count bits / 32)], the last one with zeros behind the codes.
template <int kBits>
QCLI_INLINE void pack_row(const uint8_t* codes, int64_t count, uint64_t offset, uint32_t* words) {
  uint8_t* out = reinterpret_cast<uint8_t*>(words);
  const int64_t whole = count / 8;
  for (int64_t i = 0; i < whole; i++) {
    uint64_t x;
    memcpy(&x, codes + 8 * i, 8);
    x = squeeze<kBits>(x, offset);
    memcpy(out + i * kBits, &x, kBits);
  }
  const int64_t rest = count - 8 * whole, end = divide_up(count * kBits, 32) * 4;
  memset(out + whole * kBits, 0, end - whole * kBits);
  if (!rest) return;
  uint64_t x = 0;
  memcpy(&x, codes + 8 * whole, rest);
  x = squeeze<kBits>(x, offset);
  if (rest * kBits < 64) x &= (uint64_t(1) << (rest * kBits)) - 1;
  memcpy(out + whole * kBits, &x, divide_up(rest * kBits, 8));
}

constexpr int64_t kUnit = 64;  // columns of a unit of planes

// A unit of codes, which are unsigned, into planes: 8 kBits bytes.
template <int kBits>
QCLI_INLINE void pack_unit(const uint64_t (&codes)[8], uint8_t* out) {
  uint64_t words[kBits] = {};
  if (kBits == 4) {
    for (int i = 0; i < 4; i++) words[i] = codes[i] | codes[4 + i] << 4;
  } else {
    for (int i = 0; i < 8; i++) words[i % 2] |= (codes[i] & 0x0303030303030303u) << (i / 2 * 2);
  }
  if (kBits == 3) {  // the product brings the lowest bit of byte i to bit 56 + i
    for (int i = 0; i < 8; i++) words[2] |= ((codes[i] >> 2 & 0x0101010101010101u) * 0x0102040810204080u >> 56) << (8 * i);
  }
  memcpy(out, words, sizeof words);
}

// A row of codes into units, the last one with zeros behind the codes.
template <int kBits>
QCLI_INLINE void pack_planes(const uint8_t* codes, int64_t count, uint64_t offset, uint8_t* out) {
  constexpr uint64_t kLow = 0x0101010101010101u * ((1u << kBits) - 1);
  for (int64_t at = 0; at < count; at += kUnit, out += 8 * kBits) {
    const int64_t some = smaller(kUnit, count - at);
    uint64_t unit[8] = {};
    uint8_t* const bytes = reinterpret_cast<uint8_t*>(unit);
    memcpy(bytes, codes + at, some);
    for (int i = 0; i < 8; i++) unit[i] = (unit[i] & kLow) ^ offset;
    if (some < kUnit) memset(bytes + some, 0, kUnit - some);
    pack_unit<kBits>(unit, out);
  }
}

struct Codes {
  const uint8_t* data;
  int64_t rows, columns;
  uint64_t offset;       // of eight codes
  const int32_t* order;  // of the rows in a word, for kAwq
};

// Row `at` of words before they are transposed.
template <int kBits>
QCLI_INLINE void make_row(const Codes& codes, int layout, int64_t at, uint32_t* words) {
  if (layout != kAwq) {
    pack_row<kBits>(codes.data + at * codes.columns, codes.columns, codes.offset, words);
    return;
  }
  const uint8_t* row[8];
  for (int i = 0; i < 8; i++) row[i] = codes.data + (8 * at + codes.order[i]) * codes.columns;
  const uint32_t offset = codes.offset & 0xff;
  for (int64_t c = 0; c < codes.columns; c++) {
    uint32_t word = 0;
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) word |= ((row[i][c] & 15) ^ offset) << (4 * i);
    words[c] = word;
  }
}

template <int kBits>
void pack(const Codes& codes, int layout, uint32_t* out, int threads) {
  const int64_t down = layout == kAwq ? codes.rows / 8 : codes.rows;
  const int64_t width = layout == kAwq ? codes.columns : divide_up(codes.columns * kBits, 32);
  const int64_t grain = divide_up(1 << 16, larger<int64_t>(codes.columns, 1));
  if constexpr (kBits < 8) {
    if (layout == kPlanes) {
      const int64_t bytes = divide_up(codes.columns, kUnit) * 8 * kBits;
      parallel(down, grain, threads, [=, &codes](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; r++) {
          uint8_t* const to = reinterpret_cast<uint8_t*>(out) + r * bytes;
          pack_planes<kBits>(codes.data + r * codes.columns, codes.columns, codes.offset, to);
        }
      });
      return;
    }
  }
  if (layout == kRows) {
    parallel(down, grain, threads, [=, &codes](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; r++) make_row<kBits>(codes, kRows, r, out + r * width);
    });
    return;
  }
  parallel(divide_up(down, kTile), divide_up(grain, kTile), threads, [=, &codes](int64_t first, int64_t last) {
    const int64_t apart = width + 16;  // rows of a power of two would meet in few sets of the cache
    const Scratch scratch(kTile * apart * 4);
    uint32_t* tile = scratch.as<uint32_t>();
    for (int64_t t = first; t < last; t++) {
      const int64_t from = t * kTile, count = smaller(kTile, down - from);
      for (int64_t r = 0; r < count; r++) make_row<kBits>(codes, layout, from + r, tile + r * apart);
      for (int64_t w = 0; w < width; w++) {
        for (int64_t r = 0; r < count; r++) out[w * down + from + r] = tile[r * apart + w];
      }
    }
  });
}

}  // namespace

// codes [rows, columns], a byte each; `offset`, 0 or 2^(bits-1), is added to each. out, for kRows [rows, ceil(columns bits / 32)],
// for kColumns that transposed, for kAwq [columns, rows / 8] with the rows of `order` [8] in a word, for kPlanes of 2 to 4 bits
// [rows, 2 bits ceil(columns / 64)].
QCLI_KERNEL(pack_codes)
(const void* codes, int64_t rows, int64_t columns, int bits, int offset, int layout, const int32_t* order, void* out, int threads) {
  const Codes all = {static_cast<const uint8_t*>(codes), rows, columns, uint64_t(offset) * 0x0101010101010101u, order};
  uint32_t* words = static_cast<uint32_t*>(out);
  switch (bits) {
    case 2: pack<2>(all, layout, words, threads); break;
    case 3: pack<3>(all, layout, words, threads); break;
    case 4: pack<4>(all, layout, words, threads); break;
    case 8: pack<8>(all, layout, words, threads); break;
  }
}
