// x in chunks of 128, for the products of few tokens with 4-bit and 8-bit weights.
//
// It is float32. For 4-bit weights with the compute dtype bfloat16 it is 16-bit integers, because decoding, not memory, is the limit
// there: codes in steps of 1 / 8064, x of each chunk in steps of its largest magnitude / 32767. Half a step of a code is finer
// than bfloat16's rounding of it. The steps of x cost no more than that once outliers are taken out: elements of more than kOutlier
// times the mean magnitude of the rest of their chunk. They are multiplied in float32, apart, as LLM.int8() does with columns.
//
// Multiplying pairs of bfloat16 (AVX512_BF16) would round as much, and is no faster than float32: vdpbf16ps takes two cycles,
// vpdpwssd half a cycle (Xeon with AMX).
#pragma once

#include "int16.h"

namespace {

constexpr int64_t kChunk = 128;
QCLI_INLINE int64_t padded_to_chunks(int64_t k) { return divide_up(k, kChunk) * kChunk; }

// An element that is multiplied in float32.
struct Outlier {
  int64_t i;
  float value;
};

// Copies a chunk of x, `count` elements and zeros, to float32.
template <class T>
QCLI_INLINE void widen_chunk(const T* x, int64_t count, float* to) {
  if (count >= kChunk) {
    for (int j = 0; j < kChunk; j += 16) store(to + j, load(x + j));
    return;
  }
  for (int64_t i = 0; i < kChunk; i++) to[i] = i < count ? to_float(x[i]) : 0.0f;
}

// The order of a 4-bit weight's codes after look-up. Shift j moves the code of element 8 lane + (j ^ 1) to the low four bits of a
// lane, where the look-up reads it. That element of x is therefore stored at 16 j + lane.
struct NibbleOrder {
  static constexpr int element_at(int place) { return 8 * (place % 16) + ((place / 16) ^ 1); }
};
struct NaturalOrder {
  static constexpr int element_at(int place) { return place; }
};

// x [rows, k] in float32, with zeros up to whole chunks.
template <class Order>
class Float32 {
 public:
  template <class T>
  Float32(const T* x, int64_t rows, int64_t k) : padded_(padded_to_chunks(k)), values_(4 * rows * padded_) {
    float* to = values_.as<float>();
    float chunk[kChunk];
    for (int64_t t = 0; t < rows; t++, x += k) {
      for (int64_t i = 0; i < k; i += kChunk, to += kChunk) {
        widen_chunk(x + i, k - i, chunk);
        for (int place = 0; place < kChunk; place++) to[place] = chunk[Order::element_at(place)];
      }
    }
  }
  const float* at(int64_t t, int64_t i) const { return values_.as<float>() + t * padded_ + i; }
  int64_t padded() const { return padded_; }
  // No element is multiplied apart.
  int64_t outliers(int64_t) const { return 0; }
  Outlier outlier(int64_t, int64_t) const { return {}; }

 private:
  int64_t padded_;
  Scratch values_;
};

#if defined(QCLI_INT16_PRODUCTS)
constexpr float kSteps = 32767;
constexpr float kOutlier = 64;

// x [rows, k] in 16-bit integers, in the order of a 4-bit weight's codes after look-up, with one step size per chunk and zeros up to
// whole chunks.
class Int16 {
 public:
  template <class T>
  Int16(const T* x, int64_t rows, int64_t k)
      : padded_(padded_to_chunks(k)),
        most_(8 + k / 64),
        values_(2 * rows * padded_),
        steps_(4 * rows * (padded_ / kChunk)),
        outliers_(rows * (8 + most_ * int64_t(sizeof(Outlier)))) {
    int16_t* to = values_.as<int16_t>();
    float* step = steps_.as<float>();
    float chunk[kChunk];
    int32_t rounded_x[kChunk];
    for (int64_t t = 0; t < rows; t++, x += k) {
      count(t) = 0;
      for (int64_t i = 0; i < k; i += kChunk, to += kChunk) {
        widen_chunk(x + i, k - i, chunk);
        const float largest = without_outliers(chunk, smaller(kChunk, k - i), t, i);
        if (!usable_) return;
        const F32x16 scale = all(largest > 0 ? kSteps / largest : 0.0f);
        for (int j = 0; j < kChunk; j += 16) store_ints(rounded_x + j, rounded(load(chunk + j) * scale));
        for (int place = 0; place < kChunk; place++) to[place] = int16_t(rounded_x[element_of(place / 32, place % 32)]);
        *step++ = largest / kSteps;
      }
    }
  }
  bool usable() const { return usable_; }  // false with many outliers, NaN, infinity or extreme magnitudes
  const int16_t* at(int64_t t, int64_t i) const { return values_.as<int16_t>() + t * padded_ + i; }
  float step(int64_t t, int64_t i) const { return steps_.as<float>()[(t * padded_ + i) / kChunk]; }
  int64_t padded() const { return padded_; }
  int64_t outliers(int64_t t) const { return of_token(t)[0]; }
  Outlier outlier(int64_t t, int64_t o) const { return reinterpret_cast<const Outlier*>(of_token(t) + 1)[o]; }

 private:
  int64_t* of_token(int64_t t) const { return outliers_.as<int64_t>() + t * (1 + most_ * int64_t(sizeof(Outlier)) / 8); }
  int64_t& count(int64_t t) { return of_token(t)[0]; }

  // Takes outliers out of a chunk that begins at i of token t. Returns the largest of the other magnitudes.
  QCLI_INLINE float without_outliers(float* chunk, int64_t size, int64_t t, int64_t i) {
    for (;;) {
      const float largest = absmax_of(chunk, kChunk);
      F32x16 sum = all(0.0f);
      for (int j = 0; j < kChunk; j += 16) sum = sum + magnitudes(load(chunk + j));
      const float others = (sum_lanes(sum) - largest) / float(larger<int64_t>(size - 1, 1));
      if (largest == 0) return largest;
      usable_ &= largest > 1e-30f && largest < 1e30f;  // false for NaN
      if (!usable_ || largest <= kOutlier * others) return largest;
      int at = 0;
      while (__builtin_fabsf(chunk[at]) != largest) at++;
      usable_ = count(t) < most_;
      if (!usable_) return largest;
      reinterpret_cast<Outlier*>(of_token(t) + 1)[count(t)++] = {i + at, chunk[at]};
      chunk[at] = 0;
    }
  }

  int64_t padded_, most_;
  Scratch values_, steps_, outliers_;
  bool usable_ = true;
};
#endif

}  // namespace
