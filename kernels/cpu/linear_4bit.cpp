// The product with a 4-bit weight for a few tokens; the weight is never expanded in memory.
//
//   y[t, n] = sum_k x[t, k] * code[c[n, k]] * absmax[(n K + k) / block_size]  +  bias[n]
//
// Streams half a byte a weight, and 4 / block_size bytes of absmax (or 1 / block_size nested). 128 weights are 16 lanes of
// 32 bits, eight codes each: shift j brings the code of element 8 lane + (j ^ 1) to the low four bits, where the look-up
// reads it. x is laid out to match once, so that the inner loop is shift, look-up, multiply-add. The products of a chunk are
// scaled by absmax once. Sums are float32, in 16 lanes.
//
// Multiplying pairs of bfloat16 (AVX512_BF16) needs half the instructions, but vdpbf16ps and word look-ups take twice the
// cycles: measured on Sapphire Rapids it gains nothing, and would round code values.
//
// Where rows are no multiple of 128, or blocks of none of the sizes below, a row is expanded in L1 and multiplied there.

#include <cstdlib>

#include "simd.h"

namespace {

constexpr int64_t kChunk = 128;
constexpr int64_t kAhead = 1024;  // bytes
constexpr int kPieces = 2;        // of the rows, a thread: each begins with streams that memory does not foresee

// Tokens share decoded weights, rows share loaded x, as registers allow. Rows that are multiplied together lie far apart:
// memory then has as many streams to fetch at once.
constexpr int kTokens = 4, kRows = 4;

struct Weight {
  const uint8_t* packed;
  const float* absmax;         // null where it is nested
  const uint8_t* nested_codes;
  const float* nested_absmax;
  const float* map;
  float offset;
  int64_t block_size;
  const float* code;
  int64_t out_features, k;
};

// absmax of blocks first .. first + count.
QCLI_INLINE const float* scales_of(const Weight& w, int64_t first, int64_t count, float* scratch) {
  const int64_t later = first + 8 * count;  // some rows on: one line each is no stream that hardware would see
  if (w.absmax) {
    for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(w.absmax + later + i);
    return w.absmax + first;
  }
  for (int64_t i = 0; i < count; i += 64) __builtin_prefetch(w.nested_codes + later + i);
  const F32x16 offset = all(w.offset);
  int64_t i = 0;
  while (i < count) {
    const int64_t block = first + i;
    if (i + 16 <= count && block % 256 <= 240) {
      const F32x16 values = gather(w.map, load_bytes(w.nested_codes + block));
      store(scratch + i, values * all(w.nested_absmax[block / 256]) + offset);
      i += 16;
    } else {
      scratch[i] = w.map[w.nested_codes[block]] * w.nested_absmax[block / 256] + w.offset;
      i++;
    }
  }
  return scratch;
}

// A chunk of x as the look-ups find its weights: element 8 lane + (j ^ 1) at 16 j + lane.
template <class T>
void lay_out(const T* x, float* to) {
  for (int lane = 0; lane < 16; lane++) {
    for (int j = 0; j < 8; j++) to[16 * j + lane] = to_float(x[8 * lane + (j ^ 1)]);
  }
}

template <int kT, int kR>
QCLI_INLINE void add_products(Table16 table, const I32x16* codes, const float* x, int64_t stride, const F32x16* scales,
                              F32x16 (*totals)[kT]) {
  F32x16 sums[kR][kT];
#define QCLI_STEP(j)                                                                       \
  for (int r = 0; r < kR; r++) {                                                           \
    const F32x16 weights = look_up<4 * j>(table, codes[r]);                                \
    for (int t = 0; t < kT; t++) {                                                         \
      const F32x16 values = load(x + t * stride + 16 * j);                                 \
      sums[r][t] = j ? fused(weights, values, sums[r][t]) : weights * values;              \
    }                                                                                      \
  }
  QCLI_STEP(0)
  QCLI_STEP(1)
  QCLI_STEP(2)
  QCLI_STEP(3)
  QCLI_STEP(4)
  QCLI_STEP(5)
  QCLI_STEP(6)
  QCLI_STEP(7)
#undef QCLI_STEP
  for (int r = 0; r < kR; r++) {
    for (int t = 0; t < kT; t++) totals[r][t] = fused(sums[r][t], scales[r], totals[r][t]);
  }
}

// The hardware's own prefetching stops at pages and falls behind the arithmetic.
QCLI_INLINE I32x16 load_chunk(const uint8_t* p) {
  __builtin_prefetch(p + kAhead);
  return load_ints(p);
}

struct Row {
  const uint8_t* packed;
  const float* scales;  // of its blocks
  int64_t into_block;   // where in its first block it begins
};

// kR rows by kT tokens; x is laid out in chunks, `stride` floats a token. sums[r][t].
template <int kT, int kR>
void products(const Weight& w, const Row* rows, const float* x, int64_t stride, float (*sums)[kTokens]) {
  const Table16 table = table16(w.code);
  F32x16 totals[kR][kT];
  for (int r = 0; r < kR; r++) {
    for (int t = 0; t < kT; t++) totals[r][t] = all(0.0f);
  }
  const auto add = [&](int64_t i, const auto& scale_of) {
    I32x16 codes[kR];
    F32x16 scale[kR];
    for (int r = 0; r < kR; r++) {
      codes[r] = load_chunk(rows[r].packed + i / 2);
      scale[r] = scale_of(rows[r]);
    }
    add_products<kT, kR>(table, codes, x + i, stride, scale, totals);
  };
  if (w.block_size == 64) {
    for (int64_t i = 0; i < w.k; i += kChunk) {
      add(i, [=](const Row& row) { return halves(row.scales[i / 64], row.scales[i / 64 + 1]); });
    }
  } else if (w.block_size == 32) {
    for (int64_t i = 0; i < w.k; i += kChunk) {
      add(i, [=](const Row& row) { return quarters(row.scales + i / 32); });
    }
  } else {
    for (int64_t i = 0; i < w.k; i += kChunk) {
      add(i, [=, &w](const Row& row) { return all(row.scales[(row.into_block + i) / w.block_size]); });
    }
  }
  for (int r = 0; r < kR; r++) {
    for (int t = 0; t < kT; t++) sums[r][t] = sum_lanes(totals[r][t]);
  }
}

template <int kT>
void products(int count, const Weight& w, const Row* rows, const float* x, int64_t stride, float (*sums)[kTokens]) {
  if (count == 4 && kT <= 2) {
    products<kT, 4>(w, rows, x, stride, sums);
    return;
  }
  for (int r = 0; r < count; r += 2) {
    (count - r > 1 ? products<kT, 2> : products<kT, 1>)(w, rows + r, x, stride, sums + r);
  }
}

void products(int tokens, int count, const Weight& w, const Row* rows, const float* x, int64_t stride,
              float (*sums)[kTokens]) {
  switch (tokens) {
    case 1: products<1>(count, w, rows, x, stride, sums); break;
    case 2: products<2>(count, w, rows, x, stride, sums); break;
    case 3: products<3>(count, w, rows, x, stride, sums); break;
    default: products<kTokens>(count, w, rows, x, stride, sums); break;
  }
}

// A row expanded to float32, whatever its place and its blocks. `pairs` holds the two values of every byte.
void expand_row(const Weight& w, int64_t n, const float* scales, int64_t first_block, const float (*pairs)[2], float* out) {
  int64_t i = n * w.k;
  const int64_t end = i + w.k;
  while (i < end) {
    const float scale = scales[i / w.block_size - first_block];
    const int64_t stop = smaller(end, (i / w.block_size + 1) * w.block_size);
    if (i % 2) *out++ = pairs[w.packed[i++ / 2]][1] * scale;
    for (; i + 2 <= stop; i += 2, out += 2) {
      const float* pair = pairs[w.packed[i / 2]];
      out[0] = pair[0] * scale;
      out[1] = pair[1] * scale;
    }
    if (i < stop) *out++ = pairs[w.packed[i++ / 2]][0] * scale;
  }
}

float dot(const float* x, const float* w, int64_t padded) {
  F32x16 a = all(0.0f), b = a;
  for (int64_t i = 0; i < padded; i += 32) {
    a = fused(load(x + i), load(w + i), a);
    b = fused(load(x + i + 16), load(w + i + 16), b);
  }
  return sum_lanes(a + b);
}

struct Scratch {
  float* data;
  explicit Scratch(int64_t count) : data(static_cast<float*>(aligned_alloc(64, divide_up(count * 4 + 64, 64) * 64))) {}
  ~Scratch() { free(data); }
};

template <class T>
QCLI_INLINE void put(const float* sums, int tokens, const float* bias, int64_t n, int64_t out_features, T* y) {
  for (int t = 0; t < tokens; t++) from_float(bias ? sums[t] + bias[n] : sums[t], &y[t * out_features + n]);
}

template <class T>
void linear_in_chunks(const T* x, int64_t rows, const Weight& w, const float* bias, T* y, int threads) {
  const int64_t k = w.k, bs = w.block_size;
  const Scratch laid_out(rows * k);
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t i = 0; i < k; i += kChunk) lay_out(x + r * k + i, laid_out.data + r * k + i);
  }
  const float* tokens = laid_out.data;
  parallel(w.out_features, divide_up(w.out_features, kPieces * larger(threads, 1)), threads, [=, &w](int64_t first, int64_t last) {
    const int64_t most = divide_up(k, bs) + 1, apart = divide_up(last - first, kRows);
    const Scratch scratch(kRows * most);
    for (int64_t i = first; i < first + apart; i++) {
      Row together[kRows];
      int count = 0;
      for (int64_t n = i; n < last; n += apart, count++) {
        const int64_t start = n * k, block = start / bs;
        const float* scales = scales_of(w, block, divide_up(start + k, bs) - block, scratch.data + count * most);
        together[count] = {w.packed + start / 2, scales, start - block * bs};
      }
      for (int64_t t = 0; t < rows; t += kTokens) {
        const int some = int(smaller<int64_t>(kTokens, rows - t));
        float sums[kRows][kTokens];
        products(some, count, w, together, tokens + t * k, k, sums);
        for (int r = 0; r < count; r++) put(sums[r], some, bias, i + r * apart, w.out_features, y + t * w.out_features);
      }
    }
  });
}

template <class T>
void linear_by_rows(const T* x, int64_t rows, const Weight& w, const float* bias, T* y, int threads) {
  const int64_t k = w.k, padded = divide_up(k, 32) * 32;
  const Scratch wide(rows * padded);
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t i = 0; i < padded; i++) wide.data[r * padded + i] = i < k ? to_float(x[r * k + i]) : 0.0f;
  }
  float pairs[256][2];
  for (int byte = 0; byte < 256; byte++) {
    pairs[byte][0] = w.code[byte >> 4];
    pairs[byte][1] = w.code[byte & 15];
  }
  const float* tokens = wide.data;
  parallel(w.out_features, divide_up(w.out_features, kPieces * larger(threads, 1)), threads, [=, &w, &pairs](int64_t first, int64_t last) {
    const Scratch row(padded), scratch(k / w.block_size + 2);
    for (int64_t i = k; i < padded; i++) row.data[i] = 0;
    for (int64_t n = first; n < last; n++) {
      const int64_t first_block = n * k / w.block_size, blocks = divide_up((n + 1) * k, w.block_size) - first_block;
      expand_row(w, n, scales_of(w, first_block, blocks, scratch.data), first_block, pairs, row.data);
      for (int64_t r = 0; r < rows; r++) {
        const float sum = dot(tokens + r * padded, row.data, padded);
        put(&sum, 1, bias, n, w.out_features, y + r * w.out_features);
      }
    }
  });
}

template <class T>
void linear(const void* input, int64_t rows, const Weight& w, const float* bias, void* output, int threads) {
  const T* x = static_cast<const T*>(input);
  T* y = static_cast<T*>(output);
  const bool chunked = w.k % kChunk == 0 && (w.block_size == 64 || w.block_size == 32 || w.block_size % kChunk == 0);
  (chunked ? linear_in_chunks<T> : linear_by_rows<T>)(x, rows, w, bias, y, threads);
}

}  // namespace

// x [rows, k] of `dtype`; packed uint8 [ceil(out_features k / 2)]; absmax float32 [blocks], or its uint8 codes where
// nested_absmax float32 [ceil(blocks / 256)] is not null; map float32 [256]; code float32 [16]; bias float32 [out_features]
// or null; y [rows, out_features] of `dtype`.
QCLI_KERNEL(linear_4bit)
(const void* x, int dtype, int64_t rows, const uint8_t* packed, const void* absmax, const float* nested_absmax,
 const float* map, float offset, const float* bias, int64_t block_size, const float* code, int64_t out_features, int64_t k,
 void* y, int threads) {
  const Weight weight = {packed,
                         nested_absmax ? nullptr : static_cast<const float*>(absmax),
                         static_cast<const uint8_t*>(absmax),
                         nested_absmax,
                         map,
                         offset,
                         block_size,
                         code,
                         out_features,
                         k};
  QCLI_DISPATCH(dtype, linear, x, rows, weight, bias, y, threads)
}
