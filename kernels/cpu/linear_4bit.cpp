// The product with a 4-bit weight for few tokens. The weight is never expanded in memory.
//
//   y[t, n] = sum_k x[t, k] * code[c[n, k]] * absmax[(n K + k) / block_size]  +  bias[n]
//
// Reads half a byte per weight, and 4 / block_size bytes of absmax (or 1 / block_size nested). A chunk of 128 weights is decoded by
// table look-up and multiplied in 16 lanes. absmax scales its sums once, and rows are summed in float32. x is reordered once, to
// the order in which look-ups decode the weights.
//
// Products are float32, or of 16-bit integers: see chunks.h.
//
// If a row is not a multiple of 128, or the block size is none of those below, a row is expanded in L1 and multiplied there.

#include "chunks.h"

namespace {

constexpr int64_t kAhead = 1024;  // bytes
constexpr int kPieces = 2;        // pieces of rows per thread; few, because each begins with streams that are not prefetched

// Tokens share decoded weights and rows share loaded x, as far as registers allow. Rows that are multiplied together are far apart,
// so memory fetches as many streams at once.
constexpr int kTokens = 4, kRows = 4;

// The layout is that of the Record in qcli/ops/linear_4bit.py.
struct Weight {
  const uint8_t* packed;        // [ceil(out_features k / 2)]
  const float* absmax;          // [blocks]; null if it is nested:
  const uint8_t* nested_codes;  // [blocks]
  const float* nested_absmax;   // [ceil(blocks / 256)]
  const float* map;             // [256]
  const float* code;            // [16]
  Bias bias;                    // [out_features]
  int64_t block_size, out_features, k;
  float offset;
  int32_t coarse;  // the compute dtype is bfloat16
};

// absmax of the blocks first .. first + count.
QCLI_INLINE const float* scales_of(const Weight& w, int64_t first, int64_t count, float* scratch) {
  const int64_t later = first + 8 * count;  // some rows later; hardware does not detect one line per row as a stream
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

// The hardware's own prefetching stops at page borders and is slower than the arithmetic.
QCLI_INLINE I32x16 load_chunk(const uint8_t* p) {
  __builtin_prefetch(p + kAhead);
  return load_ints(p);
}

struct Row {
  const uint8_t* packed;
  const float* scales;  // absmax of its blocks
  int64_t into_block;   // the position of its start in its first block
};

// kR rows times kT tokens from t on: sums[r][s].
template <int kT, int kR, class X>
void products(const Weight& w, const Row* rows, const X& x, int64_t t, float (*sums)[kTokens]) {
  const typename X::Table table = X::table(w.code);
  F32x16 totals[kR][kT];
  for (int r = 0; r < kR; r++) {
    for (int s = 0; s < kT; s++) totals[r][s] = all(0.0f);
  }
  const auto add = [&](int64_t i, const auto& scale_of) {
    I32x16 chunk[kR];
    F32x16 scales[kR];
    for (int r = 0; r < kR; r++) {
      chunk[r] = load_chunk(rows[r].packed + i / 2);
      scales[r] = scale_of(rows[r]);
    }
    x.template add<kT, kR>(table, chunk, t, i, scales, totals);
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
    for (int s = 0; s < kT; s++) sums[r][s] = sum_lanes(totals[r][s]);
  }
}

template <int kT, class X>
void products(int count, const Weight& w, const Row* rows, const X& x, int64_t t, float (*sums)[kTokens]) {
  if (count == 4 && kT <= 2) {
    products<kT, 4>(w, rows, x, t, sums);
    return;
  }
  for (int r = 0; r < count; r += 2) {
    (count - r > 1 ? products<kT, 2, X> : products<kT, 1, X>)(w, rows + r, x, t, sums + r);
  }
}

template <class X>
void products(int tokens, int count, const Weight& w, const Row* rows, const X& x, int64_t t, float (*sums)[kTokens]) {
  switch (tokens) {
    case 1: products<1>(count, w, rows, x, t, sums); break;
    case 2: products<2>(count, w, rows, x, t, sums); break;
    case 3: products<3>(count, w, rows, x, t, sums); break;
    default: products<kTokens>(count, w, rows, x, t, sums); break;
  }
}

// Expands a row to float32, for any start and any block size. `pairs` has the two values of every byte.
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

template <class T>
QCLI_INLINE void put(const float* sums, int tokens, const Weight& w, int64_t n, T* y) {
  const float bias = w.bias.at(n);
  for (int t = 0; t < tokens; t++) from_float(sums[t] + bias, &y[t * w.out_features + n]);
}

template <class T, class X>
void linear_in_chunks(const X& x, int64_t tokens, const Weight& w, T* y, int threads) {
  const int64_t k = w.k, bs = w.block_size;
  parallel(w.out_features, divide_up(w.out_features, kPieces * larger(threads, 1)), threads, [=, &w, &x](int64_t first, int64_t last) {
    const int64_t most = divide_up(k, bs) + 1, apart = divide_up(last - first, kRows);
    const Scratch scratch(4 * kRows * most);
    for (int64_t i = first; i < first + apart; i++) {
      Row rows[kRows];
      int count = 0;
      for (int64_t n = i; n < last; n += apart, count++) {
        const int64_t start = n * k, block = start / bs;
        const float* scales = scales_of(w, block, divide_up(start + k, bs) - block, scratch.as<float>() + count * most);
        rows[count] = {w.packed + start / 2, scales, start - block * bs};
      }
      for (int64_t t = 0; t < tokens; t += kTokens) {
        const int some = int(smaller<int64_t>(kTokens, tokens - t));
        float sums[kRows][kTokens];
        products(some, count, w, rows, x, t, sums);
        for (int r = 0; r < count; r++) put(sums[r], some, w, i + r * apart, y + t * w.out_features);
      }
    }
  });
}

template <class T>
void linear_by_rows(const T* x, int64_t tokens, const Weight& w, T* y, int threads) {
  const int64_t k = w.k, padded = divide_up(k, 32) * 32;
  const Scratch wide(4 * tokens * padded);
  for (int64_t t = 0; t < tokens; t++) {
    float* to = wide.as<float>() + t * padded;
    for (int64_t i = 0; i < padded; i++) to[i] = i < k ? to_float(x[t * k + i]) : 0.0f;
  }
  float pairs[256][2];
  for (int byte = 0; byte < 256; byte++) {
    pairs[byte][0] = w.code[byte >> 4];
    pairs[byte][1] = w.code[byte & 15];
  }
  const float* values = wide.as<float>();
  parallel(w.out_features, divide_up(w.out_features, kPieces * larger(threads, 1)), threads, [=, &w, &pairs](int64_t first, int64_t last) {
    const Scratch expanded(4 * padded), scratch(4 * (k / w.block_size + 2));
    float* row = expanded.as<float>();
    for (int64_t i = k; i < padded; i++) row[i] = 0;
    for (int64_t n = first; n < last; n++) {
      const int64_t first_block = n * k / w.block_size, blocks = divide_up((n + 1) * k, w.block_size) - first_block;
      expand_row(w, n, scales_of(w, first_block, blocks, scratch.as<float>()), first_block, pairs, row);
      for (int64_t t = 0; t < tokens; t++) {
        const float sum = dot(values + t * padded, row, padded);
        put(&sum, 1, w, n, y + t * w.out_features);
      }
    }
  });
}

template <class T>
void linear(const void* input, int64_t tokens, const Weight& w, void* output, int threads) {
  const T* x = static_cast<const T*>(input);
  T* y = static_cast<T*>(output);
  if (w.k % kChunk || (w.block_size != 32 && w.block_size != 64 && w.block_size % kChunk)) {
    linear_by_rows(x, tokens, w, y, threads);
    return;
  }
#if defined(QCLI_INT16_PRODUCTS)
  if (w.coarse) {
    const Int16 laid_out(x, tokens, w.k);
    if (laid_out.usable()) {
      linear_in_chunks(laid_out, tokens, w, y, threads);
      return;
    }
  }
#endif
  linear_in_chunks(Float32(x, tokens, w.k), tokens, w, y, threads);
}

}  // namespace

// x [tokens, k] and y [tokens, out_features] of `dtype`.
QCLI_KERNEL(linear_4bit)(const void* x, int dtype, int64_t tokens, const void* weight, void* y, int threads) {
  QCLI_DISPATCH(dtype, linear, x, tokens, *static_cast<const Weight*>(weight), y, threads)
}
