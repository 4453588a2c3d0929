// Blockwise 4-bit dequantization: (code[c] - zero / 8) * absmax in float32, rounded once to the wanted dtype.
//
// It decodes the elements `start` to `start + count` of the flat weight, so a part of it can be expanded. Per element it reads half
// a byte and 4 / block_size bytes, and writes 2 or 4.

#include "simd.h"

namespace {

template <class T>
QCLI_INLINE void store_pairs(T* out, F32x16 earlier, F32x16 later) {
  F32x16 first, second;
  interleave(earlier, later, &first, &second);
  store(out, first);
  store(out + 16, second);
}

#if defined(__AVX512F__)
// In bfloat16 the two halves of a lane are the two elements of a byte, so no shuffle is needed.
QCLI_INLINE void store_pairs(bf16* out, F32x16 earlier, F32x16 later) {
  const __m512i a = _mm512_castps_si512(earlier.v), b = _mm512_castps_si512(later.v);
  const __m512i half = _mm512_set1_epi32(0x7fff), one = _mm512_set1_epi32(1);
  const __m512i even_a = _mm512_add_epi32(half, _mm512_and_si512(_mm512_srli_epi32(a, 16), one));
  const __m512i even_b = _mm512_add_epi32(half, _mm512_and_si512(_mm512_srli_epi32(b, 16), one));
  const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(a, even_a), 16), high = _mm512_add_epi32(b, even_b);
  const __m512i mask = _mm512_set1_epi32(0xffff);
  _mm512_storeu_si512(out, _mm512_ternarylogic_epi32(mask, low, high, 0xca));  // mask ? low : high
}
#endif

template <class T>
void one_by_one(const uint8_t* packed, float scale, float zero, const float* code, int64_t begin, int64_t end, T* out) {
  for (int64_t i = begin; i < end; i++) {
    const uint8_t byte = packed[i / 2];
    from_float((code[i % 2 ? byte & 15 : byte >> 4] - zero) * scale, out++);
  }
}

// Blocks of 16, two at a time, for as long as whole pairs of them follow each other.
template <class T>
int64_t pairs_of_blocks(const uint8_t* packed, const float* absmax, const float* code, int64_t begin, int64_t end, T* out) {
  const Table16 table = table16(code);
  for (; begin + 32 <= end; begin += 32, out += 32) {
    const float* scale = absmax + begin / 16;
    if (!__builtin_isfinite(scale[0]) || !__builtin_isfinite(scale[1])) break;
    const F32x16 scales = halves(scale[0], scale[1]);
    const I32x16 bytes = load_bytes(packed + begin / 2);
    store_pairs(out, look_up<4>(table, bytes) * scales, look_up<0>(table, bytes) * scales);
  }
  return begin;
}

template <class T>
void dequantize(const uint8_t* packed, const float* absmax, const int8_t* zero_point, int64_t block_size, const float* code,
                int64_t start, int64_t count, void* output, int threads) {
  T* out = static_cast<T*>(output);
  const int64_t first_block = start / block_size, blocks = divide_up(start + count, block_size) - first_block;
  parallel(blocks, divide_up(1 << 15, block_size), threads, [=](int64_t first, int64_t last) {
    for (int64_t b = first_block + first; b < first_block + last; b++) {
      if (block_size == 16 && !zero_point && b * 16 >= start) {
        const int64_t stop = smaller(start + count, (first_block + last) * 16);
        b = pairs_of_blocks(packed, absmax, code, b * 16, stop, out + (b * 16 - start)) / 16;
        if (b >= first_block + last) break;
      }
      int64_t begin = larger(start, b * block_size);
      const int64_t end = smaller(start + count, (b + 1) * block_size);
      const float scale = absmax[b], zero = zero_point ? float(zero_point[b]) * 0.125f : 0.0f;
      float values[16];  // of the codes, less the zero point
      for (int i = 0; i < 16; i++) values[i] = code[i] - zero;
      const Table16 table = table16(values);
      if (begin % 2 || !__builtin_isfinite(scale)) {  // one_by_one also rounds a NaN to a NaN
        one_by_one(packed, scale, zero, code, begin, end, out + (begin - start));
        continue;
      }
      const F32x16 scales = all(scale);
      for (; begin + 32 <= end; begin += 32) {
        const I32x16 bytes = load_bytes(packed + begin / 2);
        store_pairs(out + (begin - start), look_up<4>(table, bytes) * scales, look_up<0>(table, bytes) * scales);
      }
      one_by_one(packed, scale, zero, code, begin, end, out + (begin - start));
    }
  });
}

}  // namespace

// packed uint8 [ceil(n / 2)]; absmax float32 [ceil(n / block_size)]; zero_point int8 likewise, or null; code float32 [16]; out [count]
// of `dtype`.
QCLI_KERNEL(dequantize_4bit)
(const uint8_t* packed, const float* absmax, const int8_t* zero_point, int64_t block_size, const float* code, int64_t start,
 int64_t count, int dtype, void* out, int threads) {
  QCLI_DISPATCH(dtype, dequantize, packed, absmax, zero_point, block_size, code, start, count, out, threads)
}
