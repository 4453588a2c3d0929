// The product with a 4-bit weight for a few tokens; the weight is never expanded in memory.
//
//   y[t, n] = sum_k x[t, k] * code[c[n, k]] * absmax[(n K + k) / block_size]  +  bias[n]
//
// Streams half a byte a weight, and 4 / block_size bytes of absmax (or 1 / block_size nested). 128 weights are 16 lanes of
// 32 bits, eight codes each: shift j brings the code of element 8 lane + (j ^ 1) to the low four bits, where the look-up
// reads it. x is laid out to match once, so that the inner loop is shift, look-up, multiply-add. The products of a chunk are
// scaled by absmax once. Sums are float32, in 16 lanes.
//
// Where rows are no multiple of 128, or blocks of none of the sizes below, a row is expanded in L1 and multiplied there.

#include <cstdlib>

#include "simd.h"

namespace {

constexpr int64_t kChunk = 128;
constexpr int64_t kAhead = 4096;  // bytes

#if defined(__AVX512F__)
constexpr int kGroup = 8;  // tokens that share one decoding, as registers allow
#else
constexpr int kGroup = 4;
#endif

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
  if (w.absmax) return w.absmax + first;
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

template <int kTokens>
QCLI_INLINE void add_products(Table16 table, I32x16 codes, const float* x, int64_t stride, F32x16 scale, F32x16* totals) {
  F32x16 sums[kTokens];
  const auto step = [&](F32x16 weights, int j) {
    for (int t = 0; t < kTokens; t++) {
      const F32x16 values = load(x + t * stride + 16 * j);
      sums[t] = j ? fused(weights, values, sums[t]) : weights * values;
    }
  };
  step(look_up<0>(table, codes), 0);
  step(look_up<4>(table, codes), 1);
  step(look_up<8>(table, codes), 2);
  step(look_up<12>(table, codes), 3);
  step(look_up<16>(table, codes), 4);
  step(look_up<20>(table, codes), 5);
  step(look_up<24>(table, codes), 6);
  step(look_up<28>(table, codes), 7);
  for (int t = 0; t < kTokens; t++) totals[t] = fused(sums[t], scale, totals[t]);
}

// The hardware's own prefetching stops at pages and falls behind the arithmetic.
QCLI_INLINE I32x16 load_chunk(const uint8_t* p) {
  __builtin_prefetch(p + kAhead);
  return load_ints(p);
}

// One row by up to kGroup tokens; x is laid out in chunks, `stride` floats a token.
template <int kTokens>
void row_products(const Weight& w, int64_t n, const float* scales, int64_t first_block, const float* x, int64_t stride,
                  float* y) {
  const Table16 table = table16(w.code);
  const uint8_t* row = w.packed + n * w.k / 2;
  F32x16 totals[kTokens];
  for (int t = 0; t < kTokens; t++) totals[t] = all(0.0f);
  if (w.block_size == 64) {
    for (int64_t i = 0; i < w.k; i += kChunk, scales += 2) {
      add_products<kTokens>(table, load_chunk(row + i / 2), x + i, stride, halves(scales[0], scales[1]), totals);
    }
  } else if (w.block_size == 32) {
    for (int64_t i = 0; i < w.k; i += kChunk, scales += 4) {
      add_products<kTokens>(table, load_chunk(row + i / 2), x + i, stride, quarters(scales), totals);
    }
  } else {
    for (int64_t i = 0; i < w.k; i += kChunk) {
      const float scale = scales[(n * w.k + i) / w.block_size - first_block];
      add_products<kTokens>(table, load_chunk(row + i / 2), x + i, stride, all(scale), totals);
    }
  }
  for (int t = 0; t < kTokens; t++) y[t] = sum_lanes(totals[t]);
}

void row_products(int tokens, const Weight& w, int64_t n, const float* scales, int64_t first_block, const float* x,
                  int64_t stride, float* y) {
#define QCLI_TOKENS(count) \
  case count: row_products<count>(w, n, scales, first_block, x, stride, y); break;
  switch (tokens) {
    QCLI_TOKENS(1)
    QCLI_TOKENS(2)
    QCLI_TOKENS(3)
    QCLI_TOKENS(4)
#if defined(__AVX512F__)
    QCLI_TOKENS(5)
    QCLI_TOKENS(6)
    QCLI_TOKENS(7)
    QCLI_TOKENS(8)
#endif
  }
#undef QCLI_TOKENS
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
void linear(const void* input, int64_t rows, const Weight& w, const float* bias, void* output, int threads) {
  const T* x = static_cast<const T*>(input);
  T* y = static_cast<T*>(output);
  const int64_t k = w.k, bs = w.block_size, padded = divide_up(k, 32) * 32;
  const bool chunked = k % kChunk == 0 && (bs == 64 || bs == 32 || bs % kChunk == 0);
  const Scratch laid_out(rows * padded);
  for (int64_t r = 0; r < rows; r++) {
    float* to = laid_out.data + r * padded;
    for (int64_t i = 0; i < k; i++) {
      const int64_t in_chunk = i % kChunk, lane = in_chunk / 8, j = (in_chunk % 8) ^ 1;
      to[chunked ? i - in_chunk + 16 * j + lane : i] = to_float(x[r * k + i]);
    }
    for (int64_t i = k; i < padded; i++) to[i] = 0;
  }
  float pairs[256][2];
  for (int byte = 0; byte < 256; byte++) {
    pairs[byte][0] = w.code[byte >> 4];
    pairs[byte][1] = w.code[byte & 15];
  }
  const int64_t grain = divide_up(w.out_features, 8 * larger(threads, 1));
  const float* tokens = laid_out.data;
  parallel(w.out_features, grain, threads, [=, &w, &pairs](int64_t first, int64_t last) {
    const Scratch row(padded), scratch(k / bs + 2);
    for (int64_t i = k; i < padded; i++) row.data[i] = 0;
    for (int64_t n = first; n < last; n++) {
      const int64_t first_block = n * k / bs, blocks = divide_up((n + 1) * k, bs) - first_block;
      const float* scales = scales_of(w, first_block, blocks, scratch.data);
      if (!chunked) expand_row(w, n, scales, first_block, pairs, row.data);
      for (int64_t r = 0; r < rows; r += kGroup) {
        const int count = int(smaller<int64_t>(kGroup, rows - r));
        float sums[kGroup];
        if (chunked) {
          row_products(count, w, n, scales, first_block, tokens + r * padded, padded, sums);
        } else {
          for (int t = 0; t < count; t++) sums[t] = dot(tokens + (r + t) * padded, row.data, padded);
        }
        for (int t = 0; t < count; t++) {
          from_float(bias ? sums[t] + bias[n] : sums[t], &y[(r + t) * w.out_features + n]);
        }
      }
    }
  });
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
