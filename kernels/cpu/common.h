// Shared by all CPU kernels: names, dtypes, conversions, threads.
//
// Each op is one file. It is compiled once per instruction set ("variant"), under the names qcli_<op>_<variant>. Everything else is
// in an unnamed namespace: the linker would merge an inline function of several variants into one, which might then run AVX-512 on
// a CPU without it. For the same reason the kernels use no template or inline function of the standard library, such as std::fabs.
//
// Floating-point contraction is off (-ffp-contract=off) because results must have the same bits in every variant. The products of
// linear_4bit use fused multiply-add explicitly.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#ifndef QCLI_VARIANT
#error "QCLI_VARIANT names the instruction set, such as avx2"
#endif
#define QCLI_JOIN_(op, variant) qcli_##op##_##variant
#define QCLI_JOIN(op, variant) QCLI_JOIN_(op, variant)
#define QCLI_KERNEL(op) extern "C" __attribute__((visibility("default"))) void QCLI_JOIN(op, QCLI_VARIANT)
#define QCLI_INLINE inline __attribute__((always_inline))

// An op of a program (program.cpp). `record` has the addresses of its tensors, and its sizes. It runs for `tokens` tokens, the first
// of which has the position `start` in the text. Every op of a program has these parameters, whether it needs all of them or not.
#define QCLI_STEP(op) QCLI_KERNEL(op)(const void* record, int64_t tokens, int64_t start, int threads)

// A linear layer as an op of a program. `run` takes (x, tokens, weight, y, threads) for float32 x and y.
struct LinearStep {
  const float* x;      // [tokens, in_features]
  float* y;            // [tokens, out_features]
  const void* weight;  // the record of the linear op
};
#define QCLI_LINEAR_STEP(op, run)                                          \
  QCLI_STEP(op) {                                                          \
    (void)start;                                                           \
    const LinearStep& a = *static_cast<const LinearStep*>(record);         \
    run(a.x, tokens, *static_cast<const Weight*>(a.weight), a.y, threads); \
  }

// In parallel.cpp. Calls body(context, begin, end) over [0, count) in pieces of `grain`, with at most `threads` threads.
extern "C" __attribute__((visibility("hidden"))) void qcli_parallel(
    void (*body)(void*, int64_t, int64_t), void* context, int64_t count, int64_t grain, int threads);

namespace {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kE4M3 = 3, kE8M0 = 4 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
// A float of a sign, four exponent and three mantissa bits. Its values are those of float16 with the same bits moved up, times 256.
// NaN is not told from numbers: no quantizer stores one.
struct e4m3 {
  uint8_t bits;
};
constexpr float kE4M3Unit = 256;  // loaded values are multiplied by it later
// A power of two: the exponent of a float, with its bias. The least and the greatest code become 0 and infinity.
struct e8m0 {
  uint8_t bits;
};

template <class T>
QCLI_INLINE T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
QCLI_INLINE T larger(T a, T b) {
  return a > b ? a : b;
}
QCLI_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

QCLI_INLINE float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
QCLI_INLINE uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

QCLI_INLINE float to_float(float value) { return value; }
QCLI_INLINE float to_float(bf16 value) { return from_bits(uint32_t(value.bits) << 16); }
QCLI_INLINE float to_float(f16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, magnitude = value.bits & 0x7fff;
  if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude << 13 & 0x7fffff));
  // After the shift the exponent is 112 too small. The product corrects it, also for subnormal values.
  return from_bits(sign | to_bits(from_bits(magnitude << 13) * 0x1p112f));
}

QCLI_INLINE float to_float(e8m0 value) { return from_bits(uint32_t(value.bits) << 23); }
// Without kE4M3Unit.
QCLI_INLINE float to_float(e4m3 value) { return to_float(f16{uint16_t((value.bits & 0x80) << 8 | (value.bits & 0x7f) << 7)}); }

// Rounded to nearest, ties to even, as torch does.
QCLI_INLINE void from_float(float value, float* out) { *out = value; }
QCLI_INLINE void from_float(float value, bf16* out) {
  const uint32_t bits = to_bits(value);
  out->bits = value != value ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
QCLI_INLINE void from_float(float value, f16* out) {
  const uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000;
  const float magnitude = from_bits(bits & 0x7fffffff);
  uint32_t half;
  if (magnitude != magnitude) {
    half = 0x7e00;
  } else if (magnitude >= 65520.0f) {
    half = 0x7c00;
  } else if (magnitude < 0x1p-14f) {
    half = to_bits(magnitude + 0.5f) - to_bits(0.5f);  // the sum rounds at 2^-24, the step of subnormal values
  } else {
    const uint32_t m = to_bits(magnitude) - (112u << 23);
    half = (m + 0xfff + (m >> 13 & 1)) >> 13;
  }
  out->bits = uint16_t(sign | half);
}

// Memory for the duration of a call, aligned to a cache line.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : data_(aligned_alloc(64, divide_up(bytes + 1, 64) * 64)) {
    if (!data_) {
      fprintf(stderr, "qcli: no memory for %lld bytes of scratch\n", static_cast<long long>(bytes));
      abort();
    }
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() { free(data_); }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_;
};

// A bias in the dtype in which it is stored. There is none if `data` is null.
struct Bias {
  const void* data;
  int64_t dtype;
  QCLI_INLINE float at(int64_t n) const {
    if (!data) return 0.0f;
    if (dtype == kFloat32) return static_cast<const float*>(data)[n];
    return dtype == kBFloat16 ? to_float(static_cast<const bf16*>(data)[n]) : to_float(static_cast<const f16*>(data)[n]);
  }
};

// The largest |x| as float32 bits, with NaN above all. As unsigned integers the bits have the order of the magnitudes.
QCLI_INLINE uint32_t largest_magnitude(const float* x, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; i++) largest = larger(largest, to_bits(x[i]) & 0x7fffffff);
  return largest;
}
template <class T>
QCLI_INLINE uint16_t largest_half(const T* x, int64_t count) {
  uint16_t largest = 0;
  for (int64_t i = 0; i < count; i++) {
    const uint16_t magnitude = x[i].bits & 0x7fff;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}
QCLI_INLINE uint32_t largest_magnitude(const bf16* x, int64_t count) {
  return to_bits(to_float(bf16{largest_half(x, count)}));
}
QCLI_INLINE uint32_t largest_magnitude(const f16* x, int64_t count) {
  return to_bits(to_float(f16{largest_half(x, count)}));
}

constexpr uint32_t kInfinity = 0x7f800000, kNaN = 0x7fc00000;

// max |x|. If any x is NaN, it is always the same quiet NaN.
template <class T>
QCLI_INLINE float absmax_of(const T* x, int64_t count) {
  const uint32_t bits = largest_magnitude(x, count);
  return from_bits(bits > kInfinity ? kNaN : bits);
}

template <class Body>
void run_piece(void* context, int64_t begin, int64_t end) {
  (*static_cast<Body*>(context))(begin, end);
}
template <class Body>
void parallel(int64_t count, int64_t grain, int threads, Body body) {
  qcli_parallel(run_piece<Body>, &body, count, grain, threads);
}

}  // namespace

// Calls `function<T>(...)` with the element type of `dtype`.
#define QCLI_DISPATCH(dtype, function, ...)                            \
  switch (dtype) {                                                     \
    case kFloat32: function<float>(__VA_ARGS__); break;                \
    case kBFloat16: function<bf16>(__VA_ARGS__); break;                \
    case kFloat16: function<f16>(__VA_ARGS__); break;                  \
  }
