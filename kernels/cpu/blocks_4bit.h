// The rows of a 4-bit weight as linear_4bit reads them, and the scales of their blocks, decoded for a stream of rows at a time.
#pragma once

#include "chunks.h"

namespace {

constexpr int64_t kScales = 1024;  // absmax values that are decoded at a time for a stream of rows

// The layout is that of the Record in qcli/ops/linear_4bit.py.
struct Weight {
  const uint8_t* packed;  // [ceil(out_features k / 2)]
  const void* absmax;     // [blocks], of absmax_dtype
  const float* map;       // [256], whose entries absmax names; or null
  const float* nested;    // [ceil(blocks / 256)], by which the entries are multiplied, or null
  const int8_t* zero;     // [blocks], or null
  const float* code;      // [16]
  Bias bias;              // [out_features]
  int64_t block_size, out_features, k;
  int32_t absmax_dtype;
  float unit, offset;  // absmax is what is stored, times unit, plus offset
  int32_t coarse;      // the compute dtype is bfloat16

  // Whether absmax is read where it lies.
  QCLI_INLINE bool plain() const { return !map && unit == 1.0f && absmax_dtype == kFloat32; }
};

template <class T>
QCLI_INLINE void widen_absmax(const T* from, int64_t count, float unit, float* out) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store(out + i, load(from + i) * all(unit));
  for (; i < count; i++) out[i] = to_float(from[i]) * unit;
}

// absmax of the blocks first .. first + count, decoded to `out` unless it is plain.
QCLI_INLINE const float* absmax_of_blocks(const Weight& w, int64_t first, int64_t count, float* out) {
  if (w.plain()) return static_cast<const float*>(w.absmax) + first;
  if (!w.map) {
    switch (w.absmax_dtype) {
      case kFloat32: widen_absmax(static_cast<const float*>(w.absmax) + first, count, w.unit, out); break;
      case kE4M3: widen_absmax(static_cast<const e4m3*>(w.absmax) + first, count, w.unit * kE4M3Unit, out); break;
      case kE8M0: widen_absmax(static_cast<const e8m0*>(w.absmax) + first, count, w.unit, out); break;
      case kBFloat16: widen_absmax(static_cast<const bf16*>(w.absmax) + first, count, w.unit, out); break;
      default: widen_absmax(static_cast<const f16*>(w.absmax) + first, count, w.unit, out); break;
    }
    return out;
  }
  const uint8_t* codes = static_cast<const uint8_t*>(w.absmax) + first;
  const F32x16 offset = all(w.offset);
  const Table256 map = table256(w.map);
  for (int64_t i = 0; i < count;) {
    const int64_t group = (first + i) / 256, end = smaller(count, (group + 1) * 256 - first);
    const float scale = w.nested ? w.nested[group] : w.unit;
    for (; i + 16 <= end; i += 16) store(out + i, look_up(map, load_bytes(codes + i)) * all(scale) + offset);
    for (; i < end; i++) out[i] = w.map[codes[i]] * scale + w.offset;
  }
  return out;
}

// What a zero point adds to each weight of the blocks first .. first + count.
void offsets_of_blocks(const Weight& w, int64_t first, int64_t count, const float* absmax, float* out) {
  for (int64_t i = 0; i < count; i++) out[i] = float(w.zero[first + i]) * -0.125f * absmax[i];
}

// How a chunk's 128 products find their absmax.
enum class Scaling {
  kHalves,    // blocks of 64, rows of whole blocks
  kQuarters,  // one value per 32 weights: blocks of 32, or any other multiple of 32, repeated
  kEighths,   // blocks of 16
  kOne,       // blocks of a multiple of 128, rows of whole chunks
};

// The scales of a stream of rows. They are decoded for some rows at a time, because a row of a small model has few.
class Scales {
 public:
  Scales(const Weight& w, Scaling scaling, float* scratch)
      : w_(w), scaling_(scaling), scratch_(scratch),
        per_row_(scaling == Scaling::kQuarters ? w.k / 32 : (w.k % w.block_size ? 0 : w.k / w.block_size)) {}

  // Floats of scratch: absmax and offsets, and both repeated.
  static int64_t room(const Weight& w) { return 2 * part(w) + (w.zero ? 2 * part(w) : 0); }

  // The scales of row n, the first of which is that of its start. `last` ends the stream.
  QCLI_INLINE const float* of_row(int64_t n, int64_t last) {
    if (n >= end_) decode(n, last);
    return scales_ + place(n);
  }
  // What zero points add to its weights, likewise; null without zero points. After of_row.
  QCLI_INLINE const float* offsets_of_row(int64_t n) const { return w_.zero ? offsets_ + place(n) : nullptr; }

 private:
  static int64_t part(const Weight& w) { return larger(kScales, 2 * (w.k / 16) + 4); }

  QCLI_INLINE int64_t place(int64_t n) const {
    return per_row_ ? (n - first_) * per_row_ : n * w_.k / w_.block_size - first_block_;
  }

  void decode(int64_t n, int64_t last) {
    const int64_t k = w_.k, bs = w_.block_size;
    const bool repeat = scaling_ == Scaling::kQuarters && (bs != 32);
    const int64_t per_row = repeat ? k / 32 : divide_up(k, bs) + 1;
    first_ = n;
    end_ = smaller(last, n + larger<int64_t>(1, kScales / per_row));
    first_block_ = n * k / bs;
    const int64_t count = divide_up(end_ * k, bs) - first_block_;
    const int64_t width = w_.absmax_dtype == kFloat32 && !w_.map ? 4 : w_.absmax_dtype <= kFloat16 && !w_.map ? 2 : 1;
    const char* ahead = static_cast<const char*>(w_.absmax) + (first_block_ + count) * width;
    for (int64_t i = 0; i < count * width; i += 64) __builtin_prefetch(ahead + i);
    scales_ = absmax_of_blocks(w_, first_block_, count, scratch_);
    if (w_.zero) {
      float* offsets = scratch_ + 2 * part(w_);
      offsets_of_blocks(w_, first_block_, count, scales_, offsets);
      offsets_ = repeat ? repeated(offsets, offsets + part(w_)) : offsets;
    }
    if (repeat) scales_ = repeated(scales_, scratch_ + part(w_));
  }

  // A value per 32 weights of one per block.
  const float* repeated(const float* values, float* to) const {
    const int64_t each = w_.block_size / 32;
    int64_t block = 0, into = first_ * w_.k / 32 - first_block_ * each;
    for (int64_t i = 0; i < (end_ - first_) * (w_.k / 32); i++) {
      to[i] = values[block];
      if (++into == each) {
        into = 0;
        block++;
      }
    }
    return to;
  }

  const Weight& w_;
  Scaling scaling_;
  float* scratch_;
  int64_t per_row_;  // 0 if a row may end within a block
  const float* scales_ = nullptr;
  const float* offsets_ = nullptr;
  int64_t first_ = 0, end_ = 0, first_block_ = 0;
};

struct Row {
  const uint8_t* packed;
  const float* scales;
  const float* offsets;  // null without zero points
  int64_t into_block;    // the position of its start in its first block

  template <Scaling kScaling>
  QCLI_INLINE int64_t block_of(const Weight& w, int64_t i) const {
    if (kScaling == Scaling::kHalves) return i / 64;
    if (kScaling == Scaling::kEighths) return i / 16;
    return kScaling == Scaling::kQuarters ? i / 32 : (into_block + i) / w.block_size;
  }
  template <Scaling kScaling>
  QCLI_INLINE float scale_of(const Weight& w, int64_t i) const {
    return scales[block_of<kScaling>(w, i)];
  }
  // The scales, or the offsets, of the chunk at i, in lanes. Those beyond the row's end are zero: what is read there is another row's.
  template <Scaling kScaling>
  QCLI_INLINE F32x16 of_chunk(const Weight& w, const float* values, int64_t i) const {
    const float* at = values + block_of<kScaling>(w, i);
    if (i + kChunk <= w.k) {
      if (kScaling == Scaling::kHalves) return halves(at[0], at[1]);
      if (kScaling == Scaling::kQuarters) return quarters(at);
      return kScaling == Scaling::kEighths ? eighths(at) : all(at[0]);
    }
    constexpr int kEach = kScaling == Scaling::kEighths ? 16 : 32;
    float some[kChunk / kEach] = {};
    for (int q = 0; i + kEach * q < w.k; q++) some[q] = values[block_of<kScaling>(w, i + kEach * q)];
    return kEach == 16 ? eighths(some) : quarters(some);
  }
};

template <class T>
QCLI_INLINE void put(const float* sums, int tokens, const Weight& w, int64_t n, T* y) {
  const float bias = w.bias.at(n);
  for (int t = 0; t < tokens; t++) from_float(sums[t] + bias, &y[t * w.out_features + n]);
}

}  // namespace
