// Small floats under scales of groups, rows or blocks: scales, codes and what they cost. The rules are in qcli/ops/round_floats.py.
//
// NF3 is a table: a search among its thresholds finds the code. All others are small floats (small_floats.h).

#include "rounding.h"
#include "small_floats.h"

namespace {

enum Kind : int { kFp8 = 0, kMxfp4 = 1, kNvfp4 = 2, kNf3 = 3 };

constexpr float kE4M3Eps = 0.125f;

// The code of a value from 0 on.
QCLI_INLINE e4m3 e4m3_of(float v) {
  const float normal = larger(v, from_bits((127 - 6) << 23));
  const uint32_t exponent = to_bits(normal) & kInfinity, magic = exponent + (20 << 23);
  return {uint8_t(to_bits(v + from_bits(magic)) - magic + (exponent >> 20) - ((127 - 6) << 3))};
}

// A group's E8M0 code: the exponent of its absmax, rounded to the mantissa of E2M1, less that of the largest E2M1.
QCLI_INLINE uint8_t e8m0_of(float largest) {
  if (!(largest > 0 && largest < from_bits(kInfinity))) return 127;
  const uint32_t bits = to_bits(largest);
  const int code = int(bits >> 23) - 2 + ((bits & 0x7fffff) >= 0x600000);
  return uint8_t(code < 0 ? 0 : code > 254 ? 254 : code);
}

// Writes the scale of elements whose absmax is `largest`, and returns what they are divided by.
template <class T, int kKind>
QCLI_INLINE float find_scale(float largest, float whole, float eps, void* scales, int64_t at) {
  if (kKind == kMxfp4) {
    const uint8_t code = static_cast<uint8_t*>(scales)[at] = e8m0_of(largest);
    return code ? from_bits(uint32_t(code) << 23) : 0x1p-127f;
  }
  if (kKind == kNvfp4) {
    const float ideal = largest / kE2M1Most * whole;
    const e4m3 code = e4m3_of(ideal != ideal ? 0.0f : ideal < kE4M3Most ? ideal : kE4M3Most);
    const e4m3 kept = code.bits ? code : e4m3_of(kE4M3Eps);
    static_cast<uint8_t*>(scales)[at] = kept.bits;
    return to_float(kept) * kE4M3Unit / whole;
  }
  const float found = through<T>(largest / kE4M3Most), scale = kKind == kNf3 ? largest : found == 0 ? eps : found;
  from_float(scale, static_cast<T*>(scales) + at);
  return scale;
}

// A table of values, and the thresholds between them.
struct Codebook {
  Table16 tree, values;
};

template <class T, int kKind, bool kChecked>
QCLI_INLINE void encode(const T* x, int64_t count, float scale, const Codebook& book, uint8_t* codes, Sums* total) {
  const F32x16 divisor = all(scale), most = all(kKind == kFp8 ? kE4M3Most : kE2M1Most), least = all(0.0f) - most;
  Sums sums = *total;
  for (int64_t i = 0; i < count; i += 16) {
    const F32x16 w = load_some(x + i, count - i);
    F32x16 v = w / divisor;
    if (kChecked) v = where_number(v, v, all(0.0f));
    if (kKind == kNf3) {
      const I32x16 code = rank16(book.tree, v);
      store_some_bytes(codes + i, code, count - i);
      note<kChecked>(w, look_up<0>(book.values, code) * divisor, &sums);
      continue;
    }
    v = minimum(maximum(v, least), most);
    const I32x16 code = kKind == kFp8 ? round_to<E4M3>(&v) : round_to<E2M1>(&v);
    store_some_bytes(codes + i, code, count - i);
    note<kChecked>(w, kKind == kFp8 ? through(x, v * divisor) : v * divisor, &sums);
  }
  *total = sums;
}

struct Shape {
  int64_t rows, columns, size, height;  // tiles of `height` rows and `size` columns share a scale
  float whole, eps;
  bool given;               // the scales; of E4M3 one for all
  const float* thresholds;  // 15 of NF3, ascending, and null otherwise
  const float* values;      // 16, between the thresholds
};

template <class T, int kKind>
void run_kind(const T* x, const Shape& s, uint8_t* codes, void* scales, double* partial, int threads) {
  const int64_t tiles = divide_up(s.columns, s.size), down = divide_up(s.rows, s.height);
  const Search16 search = kKind == kNf3 ? search16(s.thresholds) : Search16{};
  const float* const values = kKind == kNf3 ? s.values : search.tree;
  parallel(down, divide_up(kGrain, larger<int64_t>(s.columns * s.height, 1)), threads, [=, &s, &search](int64_t first, int64_t last) {
    const Codebook book = {table16(search.tree), table16(values)};
    for (int64_t block = first; block < last; block++) {
      const int64_t from = block * s.height, to = smaller(s.rows, from + s.height);
      Sums sums = no_sums();
      for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t left = tile * s.size, width = smaller(s.size, s.columns - left);
        uint32_t bits = 0;
        for (int64_t row = from; row < to; row++) bits = larger(bits, largest_magnitude(x + row * s.columns + left, width));
        const float largest = from_bits(bits > kInfinity ? kNaN : bits);
        const int64_t number = kKind == kFp8 && s.given ? 0 : block * tiles + tile;
        const float scale = s.given ? to_float(static_cast<const T*>(scales)[number])
                                    : find_scale<T, kKind>(largest, s.whole, s.eps, scales, number);
        const bool plain = largest < from_bits(kInfinity) && scale > 0 && scale <= most_scale(x) / 2;
        for (int64_t row = from; row < to; row++) {
          const int64_t at = row * s.columns + left;
          if (plain) {
            encode<T, kKind, false>(x + at, width, scale, book, codes + at, &sums);
          } else {
            encode<T, kKind, true>(x + at, width, scale, book, codes + at, &sums);
          }
        }
      }
      write_sums(sums, partial + 3 * block);
    }
  });
}

template <class T>
void run(const void* input, int kind, const Shape& shape, uint8_t* codes, void* scales, double* partial, int threads) {
  const T* x = static_cast<const T*>(input);
  switch (kind) {
    case kFp8: run_kind<T, kFp8>(x, shape, codes, scales, partial, threads); break;
    case kMxfp4: run_kind<T, kMxfp4>(x, shape, codes, scales, partial, threads); break;
    case kNvfp4: run_kind<T, kNvfp4>(x, shape, codes, scales, partial, threads); break;
    case kNf3: run_kind<T, kNf3>(x, shape, codes, scales, partial, threads); break;
  }
}

}  // namespace

// x [rows, columns] of `dtype`. Tiles of `height` rows and `size` columns share a scale; the last ones may be smaller. codes uint8
// [rows, columns]. scales [ceil(rows / height), ceil(columns / size)], of `dtype` for E4M3 and NF3, bytes for E2M1; if they are `given`,
// they are read, and of E4M3 there is only one. thresholds [15] and values [16] are those of NF3, and null otherwise. partial float64
// [ceil(rows / height), 3]: squared error, squared norm and non-finite elements.
QCLI_KERNEL(round_floats)
(const void* x, int dtype, int kind, int64_t rows, int64_t columns, int64_t size, int64_t height, float whole, float eps, int given,
 const float* thresholds, const float* values, uint8_t* codes, void* scales, double* partial, int threads) {
  const Shape shape = {rows, columns, size, height, whole, eps, given != 0, thresholds, values};
  QCLI_DISPATCH(dtype, run, x, kind, shape, codes, scales, partial, threads)
}
