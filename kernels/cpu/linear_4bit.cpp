// The product with a 4-bit weight for few tokens. The weight is never expanded in memory.
//
//   y[t, n] = sum_k x[t, k] * (code[c[n, k]] - zero[b] / 8) * absmax[b]  +  bias[n],   b = (n K + k) / block_size
//
// Reads half a byte per weight, and 1 to 4 bytes of absmax per block. A chunk of 128 weights is decoded by table look-up and
// multiplied in 16 lanes. absmax scales its sums once, and rows are summed in float32. x is reordered once, to the order in which
// look-ups decode the weights. A row's last chunk may be partial: x is padded with zeros. A zero point takes its share of the sum of
// x in each lane, which is made once for all rows.
//
// Products are float32, or of 16-bit integers: see chunks.h.
//
// Where a row or a block is no multiple of 32, or a row is shorter than a chunk, a row is expanded in L1 and multiplied there.

#include "many_4bit.h"

namespace {

constexpr int kPieces = 2;  // pieces of rows per thread; few, because each begins with streams that are not prefetched

// Expands a row to float32, for any start and any block size. `pairs` has the two values of every byte.
void expand_row(const Weight& w, int64_t n, const float* scales, int64_t first_block, const float (*pairs)[2], float* out) {
  int64_t i = n * w.k;
  const int64_t end = i + w.k;
  while (i < end) {
    const int64_t block = i / w.block_size;
    const float scale = scales[block - first_block], zero = w.zero ? float(w.zero[block]) * 0.125f : 0.0f;
    const int64_t stop = smaller(end, (block + 1) * w.block_size);
    if (i % 2) *out++ = (pairs[w.packed[i++ / 2]][1] - zero) * scale;
    for (; i + 2 <= stop; i += 2, out += 2) {
      const float* pair = pairs[w.packed[i / 2]];
      out[0] = (pair[0] - zero) * scale;
      out[1] = (pair[1] - zero) * scale;
    }
    if (i < stop) *out++ = (pairs[w.packed[i++ / 2]][0] - zero) * scale;
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

template <Scaling kScaling, class T, class X>
void linear_in_chunks(const X& x, int64_t tokens, const Weight& w, T* y, int threads) {
  const int64_t k = w.k, bytes = w.out_features * k / 2, grain = divide_up(w.out_features, kPieces * larger(threads, 1));
  parallel(w.out_features, grain, threads, [=, &w, &x](int64_t first, int64_t last) {
    const int64_t apart = divide_up(last - first, kRows), room = Scales::room(w);
    const Scratch scratch(4 * kRows * room + x.padded() / 2 + kBeyond);
    uint8_t* const copy = reinterpret_cast<uint8_t*>(scratch.as<float>() + kRows * room);
    Scales scales[kRows] = {
        {w, kScaling, scratch.as<float>()},
        {w, kScaling, scratch.as<float>() + room},
        {w, kScaling, scratch.as<float>() + 2 * room},
        {w, kScaling, scratch.as<float>() + 3 * room},
    };
    for (int64_t i = first; i < first + apart; i++) {
      Row rows[kRows];
      int count = 0;
      for (int64_t n = i; n < last; n += apart, count++) {
        const int64_t start = n * k;
        const float* own = scales[count].of_row(n, smaller(last, first + (count + 1) * apart));
        rows[count] = {w.packed + start / 2, own, scales[count].offsets_of_row(n)};
        // The load of the last chunk must stay within the weight.
        if ((start + x.padded()) / 2 + kBeyond > bytes) rows[count].packed = static_cast<uint8_t*>(memcpy(copy, rows[count].packed, k / 2));
      }
      for (int64_t t = 0; t < tokens; t += kTokens) {
        const int some = int(smaller<int64_t>(kTokens, tokens - t));
        float sums[kRows][kTokens];
        products<kScaling>(some, count, w, rows, x, t, sums);
        for (int r = 0; r < count; r++) put(sums[r], some, w, i + r * apart, y + t * w.out_features);
      }
    }
  });
}

template <class T, class X>
void linear_in_chunks(const X& x, int64_t tokens, const Weight& w, T* y, int threads) {
  if (w.block_size == 16) {
    linear_in_chunks<Scaling::kEighths>(x, tokens, w, y, threads);
  } else if (w.block_size == 64 && w.k % 64 == 0) {
    linear_in_chunks<Scaling::kHalves>(x, tokens, w, y, threads);
  } else if (w.block_size % kChunk == 0 && w.k % kChunk == 0) {
    linear_in_chunks<Scaling::kOne>(x, tokens, w, y, threads);
  } else {
    linear_in_chunks<Scaling::kQuarters>(x, tokens, w, y, threads);
  }
}

template <class T>
void linear_in_floats(const T* x, int64_t tokens, const Weight& w, T* y, int threads) {
  linear_in_chunks(Floats(x, tokens, w.k, w.zero != nullptr), tokens, w, y, threads);
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
      expand_row(w, n, absmax_of_blocks(w, first_block, blocks, scratch.as<float>()), first_block, pairs, row);
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
  if (w.k % 32 || (w.block_size % 32 && w.block_size != 16) || w.k < kChunk) {
    linear_by_rows(x, tokens, w, y, threads);
    return;
  }
#if defined(QCLI_INT16_PRODUCTS)
  // The lanes of a register of 64 codes are not of one block of 16 each.
  if (w.coarse && (w.block_size != 16 || kWide == kChunk)) {
    const int64_t together = tokens > kFewTokens ? larger(kFewTokens, kTokenBytes / (2 * w.k)) : tokens;
    for (; tokens > 0; tokens -= together, x += together * w.k, y += together * w.out_features) {
      const int64_t some = smaller(together, tokens);
      const Int16 laid_out(x, some, w);
      if (!laid_out.usable()) {
        linear_in_floats(x, some, w, y, threads);
      } else if (some > kFewTokens && !w.zero && w.block_size != 16) {
        linear_of_many(laid_out, some, w, y, threads);
      } else {
        linear_in_chunks(laid_out, some, w, y, threads);
      }
    }
    return;
  }
#endif
  linear_in_floats(x, tokens, w, y, threads);
}

}  // namespace

// x [tokens, k] and y [tokens, out_features] of `dtype`.
QCLI_KERNEL(linear_4bit)(const void* x, int dtype, int64_t tokens, const void* weight, void* y, int threads) {
  QCLI_DISPATCH(dtype, linear, x, tokens, *static_cast<const Weight*>(weight), y, threads)
}

QCLI_LINEAR_STEP(linear_4bit_step, linear<float>)
