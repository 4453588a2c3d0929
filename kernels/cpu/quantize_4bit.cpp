// Blockwise 4-bit quantization. The rules are in qcli/ops/quantize_4bit.py.
//
//   absmax[b] = max |x|,   code = number of thresholds below v = x * (1 / absmax[b]),   stored as order[code]
//
// A byte has two codes, the earlier element in the high nibble. Each element is read twice, the second time from L1. Per element it
// writes half a byte and 4 / block_size bytes. A thread takes runs of blocks. Block sizes are even, so no two blocks share a byte.

#include "simd.h"

namespace {

constexpr float kSmallestReciprocal = 1e-38f;
constexpr int64_t kAhead = 2048;  // bytes

struct Codes {
  const float* thresholds;  // 15, ascending
  const uint8_t* order;     // the code of each rank
  Search16 search;
  float order_bits[16];  // order as int32 in lanes
  bool ordered;          // order is 0, 1, ... 15
};

Codes make_codes(const float* thresholds, const uint8_t* order) {
  Codes codes = {thresholds, order, search16(thresholds), {}, true};
  for (int i = 0; i < 16; i++) {
    codes.ordered &= order[i] == i;
    codes.order_bits[i] = from_bits(order[i]);
  }
  return codes;
}

uint8_t code_of(float v, const Codes& codes) {
  int rank = 0;
  for (int i = 0; i < 15; i++) rank += v > codes.thresholds[i];
  return codes.order[rank];
}

// For blocks that are not whole vectors, or that need a quotient instead of a product.
template <class T>
void one_by_one(const T* x, int64_t count, float factor, bool divide, uint8_t filler, const Codes& codes, uint8_t* out) {
  for (int64_t i = 0; i < count; i += 2) {
    uint8_t pair[2] = {filler, filler};
    for (int j = 0; j < 2 && i + j < count; j++) {
      const float value = to_float(x[i + j]);
      pair[j] = code_of(divide ? value / factor : value * factor, codes);
    }
    out[i / 2] = uint8_t(pair[0] << 4 | pair[1]);
  }
}

template <class T, bool kOrdered>
QCLI_INLINE void whole_vectors(const T* x, int64_t count, float factor, const Codes& codes, uint8_t* out) {
  const Table16 tree = table16(codes.search.tree), order = table16(codes.order_bits);
  const F32x16 scale = all(factor);
  for (int64_t i = 0; i < count; i += 16) {
    I32x16 code = rank16(tree, load(x + i) * scale);
    if (!kOrdered) code = as_ints(look_up<0>(order, code));
    store_codes(out + i / 2, code);
  }
}

template <class T>
void quantize(const void* input, int64_t count, int64_t block_size, const Codes& codes, int zero_code, uint8_t* packed,
              float* absmax, int threads) {
  const T* x = static_cast<const T*>(input);
  const int64_t blocks = divide_up(count, block_size);
  parallel(blocks, divide_up(1 << 15, block_size), threads, [=, &codes](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      const int64_t start = b * block_size, length = smaller(block_size, count - start);
      const T* block = x + start;
      for (int64_t i = 0; i < length; i += 64 / sizeof(T)) __builtin_prefetch(block + kAhead / sizeof(T) + i);
      uint8_t* out = packed + start / 2;
      const float largest = absmax[b] = absmax_of(block, length);
      const bool partial = length < block_size, tiny = largest > 0 && largest < kSmallestReciprocal;
      if ((partial && largest != 0) || tiny) {
        one_by_one(block, length, largest, true, uint8_t(zero_code), codes, out);
        continue;
      }
      const float factor = 1.0f / (largest < kSmallestReciprocal ? kSmallestReciprocal : largest);
      if (partial || length % 16) {
        one_by_one(block, length, factor, false, uint8_t(zero_code), codes, out);
      } else if (codes.ordered) {
        whole_vectors<T, true>(block, length, factor, codes, out);
      } else {
        whole_vectors<T, false>(block, length, factor, codes, out);
      }
    }
  });
}

}  // namespace

// x [count] of `dtype`; packed uint8 [ceil(count / 2)]; absmax float32 [ceil(count / block_size)].
QCLI_KERNEL(quantize_4bit)
(const void* x, int dtype, int64_t count, int64_t block_size, const float* thresholds, const uint8_t* order, int zero_code,
 uint8_t* packed, float* absmax, int threads) {
  const Codes codes = make_codes(thresholds, order);
  QCLI_DISPATCH(dtype, quantize, x, count, block_size, codes, zero_code, packed, absmax, threads)
}
