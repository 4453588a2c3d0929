// x in chunks of 128, for the products of few tokens with 4-bit and 8-bit weights.
//
// It is float32. For 4-bit weights with the compute dtype bfloat16 it is 16-bit integers, because decoding, not memory, is the
// limit there: codes in steps of 1 / 8064, x of each 64 to 1024 elements in steps of their largest magnitude / 32767. Half a step of a
// code is finer than bfloat16's rounding of it. The steps of x cost no more than that once outliers are taken out: elements of more
// than kOutlier times the mean magnitude of the rest. They are multiplied in float32, apart, as LLM.int8() does with columns.
//
// Multiplying pairs of bfloat16 (AVX512_BF16) would round as much, and is no faster than float32: vdpbf16ps takes two cycles,
// vpdpwssd half a cycle (Xeon with AMX).
#pragma once

#include "int16.h"

namespace {

constexpr int64_t kChunk = 128;
QCLI_INLINE int64_t padded_to_chunks(int64_t k) { return divide_up(k, kChunk) * kChunk; }

// Copies kCount elements of x, or `count` elements and zeros, to float32.
template <int kCount, class T>
QCLI_INLINE void widen(const T* x, int64_t count, float* to) {
  if (count >= kCount) {
    for (int j = 0; j < kCount; j += 16) store(to + j, load(x + j));
    return;
  }
  for (int64_t i = 0; i < kCount; i++) to[i] = i < count ? to_float(x[i]) : 0.0f;
}

// The order of a 4-bit weight's codes after look-up. Shift j moves the code of element 8 lane + (j ^ 1) to the low four bits of a
// lane, where the look-up reads it. That element of x is therefore stored at 16 j + lane.
struct NibbleOrder {
  static constexpr int element_at(int place) { return 8 * (place % 16) + ((place / 16) ^ 1); }
#if defined(QCLI_INT16_PRODUCTS)
  static constexpr int word_at(int place) { return element_of(place / (kWide / 4), place % (kWide / 4)); }
#endif
};
struct NaturalOrder {
  static constexpr int element_at(int place) { return place; }
};

// x [rows, k] in float32, with zeros up to whole chunks; and if they are asked for, the sums of each lane of a chunk.
template <class Order>
class Float32 {
 public:
  template <class T>
  Float32(const T* x, int64_t rows, int64_t k, bool with_sums = false)
      : padded_(padded_to_chunks(k)), values_(4 * rows * padded_), sums_(with_sums ? rows * padded_ / 2 : 0) {
    float* to = values_.as<float>();
    float* sum = sums_.as<float>();
    float chunk[kChunk];
    for (int64_t t = 0; t < rows; t++, x += k) {
      for (int64_t i = 0; i < k; i += kChunk, to += kChunk) {
        widen<kChunk>(x + i, k - i, chunk);
        for (int place = 0; place < kChunk; place++) to[place] = chunk[Order::element_at(place)];
        if (!with_sums) continue;
        F32x16 lanes = load(to);
        for (int j = 16; j < kChunk; j += 16) lanes = lanes + load(to + j);
        store(sum, lanes);
        sum += 16;
      }
    }
  }
  const float* at(int64_t t, int64_t i) const { return values_.as<float>() + t * padded_ + i; }
  const float* sums(int64_t t, int64_t i) const { return sums_.as<float>() + (t * padded_ + i) / 8; }
  int64_t padded() const { return padded_; }

 private:
  int64_t padded_;
  Scratch values_, sums_;
};

#if defined(QCLI_INT16_PRODUCTS)
constexpr float kSteps = 32767;
constexpr float kOutlier = 64;
constexpr float kCodeSteps = 8064;  // 8 * 8064 * 32767 is within int32; FP4's values, multiples of 1 / 192, stay exact

// An element that is multiplied in float32.
struct Outlier {
  int64_t i;
  float value;
};

// A table of 16 values in 16-bit integers: the values times `scale`.
QCLI_INLINE Codes16 codes_of(const float* code, float scale) {
  int32_t wide[16];
  int16_t entries[16];
  store_ints(wide, rounded(load(code) * all(scale)));
  for (int i = 0; i < 16; i++) entries[i] = int16_t(wide[i]);
  return codes16(entries);
}

// Which element of a block each place has.
template <class Order, int kBlock>
struct Places {
  uint16_t word[kBlock];
  constexpr Places() : word() {
    for (int place = 0; place < kBlock; place++) word[place] = uint16_t(Order::word_at(place));
  }
};

// x [rows, k] in 16-bit integers, in the order of codes after look-up, with zeros up to whole blocks of kBlock elements and one step
// size per kSame elements; and if they are asked for, the sums of x in each lane of a register, for blocks of kWide elements.
template <class Order, int kBlock = kWide, int kSame = kBlock>
class Integers {
 public:
  template <class T>
  Integers(const T* x, int64_t rows, int64_t k, bool with_sums = false)
      : k_(k),
        padded_(divide_up(k, kBlock) * kBlock),
        most_(8 + k / 64),
        values_(2 * rows * padded_),
        steps_(4 * rows * divide_up(k, kSame)),
        sums_(with_sums ? rows * padded_ / 2 : 0),
        outliers_(rows * (8 + most_ * int64_t(sizeof(Outlier)))) {
    int16_t* to = values_.as<int16_t>();
    float* step = steps_.as<float>();
    float* sum = sums_.as<float>();
    static constexpr Places<Order, kBlock> kPlaces;
    float some[kSame];
    int32_t rounded_x[kBlock];
    for (int64_t t = 0; t < rows; t++, x += k) {
      count(t) = 0;
      for (int64_t i = 0; i < k; i += kSame) {
        const int64_t size = smaller<int64_t>(kSame, k - i), blocks = divide_up(size, kBlock);
        widen<kSame>(x + i, size, some);
        const float largest = without_outliers(some, size, t, i);
        if (!usable_) return;
        const F32x16 scale = all(largest > 0 ? kSteps / largest : 0.0f);
        *step++ = largest / (kSteps * kCodeSteps);
        for (const float* block = some; block < some + blocks * kBlock; block += kBlock, to += kBlock) {
          for (int j = 0; j < kBlock; j += 16) store_ints(rounded_x + j, rounded(load(block + j) * scale));
          place_words<kBlock>(rounded_x, kPlaces.word, to);
          if (!with_sums) continue;
          for (int lane = 0; lane < kBlock / 8; lane++) {
            int32_t total = 0;
            for (int j = 0; j < 4; j++) total += to[j * (kBlock / 4) + 2 * lane] + to[j * (kBlock / 4) + 2 * lane + 1];
            *sum++ = float(total) * kCodeSteps;
          }
        }
      }
    }
  }
  bool usable() const { return usable_; }  // false with many outliers, NaN, infinity or extreme magnitudes
  const int16_t* at(int64_t t, int64_t i) const { return values_.as<int16_t>() + t * padded_ + i; }
  // What the sums of the integer products are multiplied by, one for each kSame elements.
  const float* steps(int64_t t) const { return steps_.as<float>() + t * divide_up(k_, kSame); }
  // In the unit of those sums.
  const float* sums(int64_t t) const { return sums_.as<float>() + t * padded_ / 8; }
  int64_t padded() const { return padded_; }
  int64_t outliers(int64_t t) const { return of_token(t)[0]; }
  Outlier outlier(int64_t t, int64_t o) const { return reinterpret_cast<const Outlier*>(of_token(t) + 1)[o]; }

 private:
  int64_t* of_token(int64_t t) const { return outliers_.as<int64_t>() + t * (1 + most_ * int64_t(sizeof(Outlier)) / 8); }
  int64_t& count(int64_t t) { return of_token(t)[0]; }

  // Takes outliers out of kSame elements that begin at i of token t. Returns the largest of the other magnitudes.
  QCLI_INLINE float without_outliers(float* some, int64_t size, int64_t t, int64_t i) {
    for (;;) {
      const float largest = absmax_of(some, kSame);
      F32x16 sum = all(0.0f);
      for (int j = 0; j < kSame; j += 16) sum = sum + magnitudes(load(some + j));
      const float others = (sum_lanes(sum) - largest) / float(larger<int64_t>(size - 1, 1));
      if (largest == 0) return largest;
      usable_ &= largest > 1e-30f && largest < 1e30f;  // false for NaN
      if (!usable_ || largest <= kOutlier * others) return largest;
      int at = 0;
      while (__builtin_fabsf(some[at]) != largest) at++;
      usable_ = count(t) < most_;
      if (!usable_) return largest;
      reinterpret_cast<Outlier*>(of_token(t) + 1)[count(t)++] = {i + at, some[at]};
      some[at] = 0;
    }
  }

  int64_t k_, padded_, most_;
  Scratch values_, steps_, sums_, outliers_;
  bool usable_ = true;
};
#endif

}  // namespace
