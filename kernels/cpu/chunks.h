// The x of linear_4bit in chunks of 128, in the order in which look-ups decode the weights, and the products of a chunk.
//
// Products are float32. With the compute dtype bfloat16 they are products of 16-bit integers, because decoding, not memory, is the
// limit: codes in steps of 1 / 8064, x of each chunk in steps of its largest magnitude / 32767. Half a step of a code is finer than
// bfloat16's rounding of it. The steps of x cost no more than that, unless a chunk has an outlier of kOutlier times the mean
// magnitude of the rest. With such an outlier, products are float32 too.
//
// Multiplying pairs of bfloat16 (AVX512_BF16) would round as much, and is no faster than float32: vdpbf16ps takes two cycles,
// vpdpwssd half a cycle (Xeon with AMX).
#pragma once

#include "int16.h"

namespace {

constexpr int64_t kChunk = 128;

// x in float32. Shift j moves the code of element 8 lane + (j ^ 1) to the low four bits of a lane, where the look-up reads it.
// That element of x is therefore stored at 16 j + lane.
class Float32 {
 public:
  using Table = Table16;
  template <class T>
  Float32(const T* x, int64_t rows, int64_t k) : k_(k), values_(4 * rows * k) {
    float* to = values_.as<float>();
    for (int64_t i = 0; i < rows * k; i += kChunk, x += kChunk, to += kChunk) {
      for (int lane = 0; lane < 16; lane++) {
        for (int j = 0; j < 8; j++) to[16 * j + lane] = to_float(x[8 * lane + (j ^ 1)]);
      }
    }
  }
  static Table table(const float* code) { return table16(code); }

  // totals += chunk * scales, for the chunk at i of kR rows and kT tokens from t on.
  template <int kT, int kR>
  QCLI_INLINE void add(Table table, const I32x16* chunk, int64_t t, int64_t i, const F32x16* scales, F32x16 (*totals)[kT]) const {
    const float* x = values_.as<float>() + t * k_ + i;
    F32x16 sums[kR][kT];
    add_step<0, kT, kR>(table, chunk, x, sums);
    add_step<1, kT, kR>(table, chunk, x, sums);
    add_step<2, kT, kR>(table, chunk, x, sums);
    add_step<3, kT, kR>(table, chunk, x, sums);
    add_step<4, kT, kR>(table, chunk, x, sums);
    add_step<5, kT, kR>(table, chunk, x, sums);
    add_step<6, kT, kR>(table, chunk, x, sums);
    add_step<7, kT, kR>(table, chunk, x, sums);
    for (int r = 0; r < kR; r++) {
      for (int s = 0; s < kT; s++) totals[r][s] = fused(sums[r][s], scales[r], totals[r][s]);
    }
  }

 private:
  template <int j, int kT, int kR>
  QCLI_INLINE void add_step(Table table, const I32x16* chunk, const float* x, F32x16 (*sums)[kT]) const {
    for (int r = 0; r < kR; r++) {
      const F32x16 weights = look_up<4 * j>(table, chunk[r]);
      for (int s = 0; s < kT; s++) {
        const F32x16 values = load(x + s * k_ + 16 * j);
        sums[r][s] = j ? fused(weights, values, sums[r][s]) : weights * values;
      }
    }
  }

  int64_t k_;
  Scratch values_;
};

#if defined(QCLI_INT16_PRODUCTS)
constexpr float kCodeSteps = 8064;  // 8 * 8064 * 32767 is within int32; FP4's values, multiples of 1 / 192, stay exact
constexpr float kSteps = 32767;
constexpr float kOutlier = 64;

// x in 16-bit integers, with one step size per chunk.
class Int16 {
 public:
  using Table = Codes16;
  template <class T>
  Int16(const T* x, int64_t rows, int64_t k) : k_(k), values_(2 * rows * k), steps_(4 * (rows * k / kChunk)) {
    int16_t* to = values_.as<int16_t>();
    float* step = steps_.as<float>();
    for (int64_t i = 0; i < rows * k; i += kChunk, x += kChunk, to += kChunk) {
      const float largest = absmax_of(x, kChunk);
      F32x16 sum = all(0.0f);
      for (int j = 0; j < kChunk; j += 16) sum = sum + magnitudes(load(x + j));
      const float others = (sum_lanes(sum) - largest) / (kChunk - 1);
      usable_ &= largest == 0 || (largest > 1e-30f && largest < 1e30f && largest <= kOutlier * others);
      const F32x16 scale = all(usable_ && largest > 0 ? kSteps / largest : 0.0f);
      int32_t rounded_x[kChunk];
      for (int j = 0; j < kChunk; j += 16) store_ints(rounded_x + j, rounded(load(x + j) * scale));
      for (int j = 0; j < 4; j++) {
        for (int w = 0; w < 32; w++) to[32 * j + w] = int16_t(rounded_x[element_of(j, w)]);
      }
      *step++ = largest / (kSteps * kCodeSteps);
    }
  }
  bool usable() const { return usable_; }  // false with outliers, NaN, infinity or extreme magnitudes
  static Table table(const float* code) {
    int16_t entries[16];
    for (int i = 0; i < 16; i++) entries[i] = int16_t(nearbyintf(code[i] * kCodeSteps));
    return codes16(entries);
  }

  template <int kT, int kR>
  QCLI_INLINE void add(Table table, const I32x16* chunk, int64_t t, int64_t i, const F32x16* scales, F32x16 (*totals)[kT]) const {
    const int16_t* x = values_.as<int16_t>() + t * k_ + i;
    const float* step = steps_.as<float>() + (t * k_ + i) / kChunk;
    I32x16 sums[kR][kT];
    add_half<0, kT, kR>(table, chunk, x, sums);
    add_half<1, kT, kR>(table, chunk, x, sums);
    for (int r = 0; r < kR; r++) {
      for (int s = 0; s < kT; s++) {
        totals[r][s] = fused(floats(sums[r][s]), scales[r] * all(step[s * (k_ / kChunk)]), totals[r][s]);
      }
    }
  }

 private:
  template <int kHalf, int kT, int kR>
  QCLI_INLINE void add_half(Table table, const I32x16* chunk, const int16_t* x, I32x16 (*sums)[kT]) const {
    for (int r = 0; r < kR; r++) {
      I16x32 weights[2];
      look_up_half<kHalf>(table, chunk[r], weights);
      for (int s = 0; s < kT; s++) {
        const int16_t* values = x + s * k_ + 32 * kHalf;
        const I32x16 sum = kHalf ? sums[r][s] : all(int32_t(0));
        sums[r][s] = add_dot(add_dot(sum, weights[0], load_words(values)), weights[1], load_words(values + 64));
      }
    }
  }

  int64_t k_;
  Scratch values_, steps_;
  bool usable_ = true;
};
#endif

}  // namespace
