// The error of 4-bit quantization. The definition is in qcli/ops/error_4bit.py.
//
// Per block: the sums of (w - v)^2, w^2, c (w - v) and c^2, where c is the code's value and v = c * absmax. They are in units of
// the block's absmax, so squares stay in range. 16 float32 lanes are added in a fixed order, then float64 adds the blocks in
// their order. The bits do not depend on threads or variant.

#include "simd.h"

namespace {

constexpr int64_t kRun = 64;  // blocks per partial sum

struct Sums {
  double error, norm;
  int64_t nonfinite;
};

template <class T>
void block_one_by_one(const T* x, int64_t start, int64_t length, const uint8_t* packed, float scale, const float* code,
                      Sums* sums, float* slope, float* curve) {
  double error = 0, norm = 0, slopes = 0, curves = 0;
  for (int64_t i = start; i < start + length; i++) {
    const double w = to_float(x[i]), c = code[i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4];
    curves += c * c;
    if (!__builtin_isfinite(w)) {
      sums->nonfinite++;
      continue;
    }
    norm += w * w;
    const double difference = w - double(float(c) * scale);
    if (!__builtin_isfinite(difference)) continue;
    error += difference * difference;
    slopes += c * difference;
  }
  sums->error += error;
  sums->norm += norm;
  *slope = float(slopes);
  *curve = float(curves);
}

template <class T>
QCLI_INLINE void block_in_vectors(const T* x, int64_t length, const uint8_t* packed, float scale, const float* code,
                                  Sums* sums, float* slope, float* curve) {
  const Table16 table = table16(code);
  const F32x16 absmax = all(scale), unit = all(1.0f / scale);
  F32x16 error = all(0.0f), norm = error, slopes = error, curves = error;
  const auto add = [&](F32x16 w, F32x16 c) {
    const F32x16 difference = (w - c * absmax) * unit, v = w * unit;
    error = error + difference * difference;
    norm = norm + v * v;
    slopes = slopes + c * difference;
    curves = curves + c * c;
  };
  for (int64_t i = 0; i < length; i += 32) {
    const I32x16 bytes = load_bytes(packed + i / 2);
    F32x16 first, second;
    interleave(look_up<4>(table, bytes), look_up<0>(table, bytes), &first, &second);
    add(load(x + i), first);
    add(load(x + i + 16), second);
  }
  const double square = double(scale) * scale;
  sums->error += square * sum_lanes(error);
  sums->norm += square * sum_lanes(norm);
  *slope = scale * sum_lanes(slopes);
  *curve = sum_lanes(curves);
}

template <class T>
void measure(const void* input, int64_t count, const uint8_t* packed, const float* absmax, int64_t block_size,
             const float* code, double* partial, bf16* slopes, bf16* curves, int threads) {
  const T* x = static_cast<const T*>(input);
  const int64_t blocks = divide_up(count, block_size);
  parallel(divide_up(blocks, kRun), divide_up(1 << 15, kRun * block_size), threads, [=](int64_t first, int64_t last) {
    for (int64_t run = first; run < last; run++) {
      Sums sums = {};
      for (int64_t b = run * kRun; b < smaller(blocks, (run + 1) * kRun); b++) {
        const int64_t start = b * block_size, length = smaller(block_size, count - start);
        const float scale = absmax[b];
        float slope, curve;
        if (length % 32 == 0 && start % 2 == 0 && scale > 1e-37f && scale < 3e38f) {
          block_in_vectors(x + start, length, packed + start / 2, scale, code, &sums, &slope, &curve);
        } else {
          block_one_by_one(x, start, length, packed, scale, code, &sums, &slope, &curve);
        }
        from_float(slope, &slopes[b]);
        from_float(curve, &curves[b]);
      }
      partial[3 * run] = sums.error;
      partial[3 * run + 1] = sums.norm;
      partial[3 * run + 2] = double(sums.nonfinite);
    }
  });
}

}  // namespace

// x [count] of `dtype`; packed and absmax are the results of quantize_4bit for x. partial float64 [ceil(blocks / 64), 3]: squared
// error, squared norm and non-finite elements of each 64 blocks. slopes and curves bfloat16 [blocks].
QCLI_KERNEL(error_4bit)
(const void* x, int dtype, int64_t count, const uint8_t* packed, const float* absmax, int64_t block_size, const float* code,
 double* partial, void* slopes, void* curves, int threads) {
  QCLI_DISPATCH(dtype, measure, x, count, packed, absmax, block_size, code, partial, static_cast<bf16*>(slopes),
                static_cast<bf16*>(curves), threads)
}
