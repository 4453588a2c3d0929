// Decodes the absmax values that double quantization stored: map[code] * nested_absmax + offset, each step rounded to float32.

#include "simd.h"

// codes uint8 [count]; nested_absmax float32 [ceil(count / 256)]; map float32 [256]; absmax float32 [count].
QCLI_KERNEL(dequantize_absmax)
(const uint8_t* codes, const float* nested_absmax, const float* map, float offset, int64_t count, float* absmax,
 int threads) {
  parallel(divide_up(count, 256), 64, threads, [=](int64_t first, int64_t last) {
    const Table256 table = table256(map);
    for (int64_t g = first; g < last; g++) {
      const F32x16 scale = all(nested_absmax[g]), shift = all(offset);
      int64_t i = g * 256;
      const int64_t end = smaller(count, i + 256);
      for (; i + 16 <= end; i += 16) store(absmax + i, look_up(table, load_bytes(codes + i)) * scale + shift);
      for (; i < end; i++) absmax[i] = map[codes[i]] * nested_absmax[g] + offset;
    }
  });
}
