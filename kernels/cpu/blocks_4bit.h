// The rows of a 4-bit weight as linear_4bit reads them, and the scales of their blocks, decoded for a stream of rows at a time.
#pragma once

#include "chunks.h"

namespace {

constexpr int64_t kScales = 1024;  // absmax values that are decoded at a time for a stream of rows
constexpr int64_t kAhead = 2048;   // bytes by which codes are fetched ahead
constexpr int64_t kBeyond = 1;     // bytes that may be read behind the last chunk of a row

// Tokens share decoded weights and rows share loaded x, as far as registers allow. Rows that are multiplied together are far apart,
// so memory fetches as many streams at once.
constexpr int kTokens = 4, kRows = 4;

// The layout is that of the Record in qcli/ops/linear_4bit.py.
struct Weight {
  const uint8_t* packed;  // [ceil(out_features k / 2)]
  const void* absmax;     // [blocks], of absmax_dtype
  const float* lines;     // [2, 16]: DYNAMIC_LINES in qcli/codebooks.py, if absmax names entries of that map; or null
  const float* nested;    // [ceil(blocks / 256)], by which the entries are multiplied, or null
  const int8_t* zero;     // [blocks], or null
  const float* code;      // [16]
  Bias bias;              // [out_features]
  int64_t block_size, out_features, k;
  int32_t absmax_dtype;
  float unit, offset;  // absmax is what is stored, times unit, plus offset
  int32_t coarse;      // the compute dtype is bfloat16

  // Whether absmax is read where it lies.
  QCLI_INLINE bool plain() const { return !lines && unit == 1.0f && absmax_dtype == kFloat32; }
};

template <class T>
QCLI_INLINE void widen_absmax(const T* from, int64_t count, float unit, float* out) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store(out + i, load(from + i) * all(unit));
  for (; i < count; i++) out[i] = to_float(from[i]) * unit;
}

// Sixteen entries of the map of double quantization, from its lines: a third of the work of looking 256 values up.
QCLI_INLINE F32x16 entries(Table16 starts, Table16 slopes, const uint8_t* codes) {
  const F32x16 p = fused(floats(load_bytes(codes)), all(4.0f), all(-4.0f * 127));
  const I32x16 bits = as_ints(p);
  return fused(look_up<23>(slopes, bits), p, turned(look_up<23>(starts, bits), p));
}

// absmax of the blocks first .. first + count, decoded to `out` unless it is plain.
QCLI_INLINE const float* absmax_of_blocks(const Weight& w, int64_t first, int64_t count, float* out) {
  if (w.plain()) return static_cast<const float*>(w.absmax) + first;
  if (!w.lines) {
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
  const Table16 starts = table16(w.lines), slopes = table16(w.lines + 16);
  for (int64_t i = 0; i < count;) {
    const int64_t group = (first + i) / 256, end = smaller(count, (group + 1) * 256 - first);
    const F32x16 scale = all(w.nested ? w.nested[group] : w.unit);
    for (; i + 16 <= end; i += 16) store(out + i, fused(entries(starts, slopes, codes + i), scale, offset));
    if (i == end) continue;
    uint8_t last[16] = {};
    float decoded[16];
    memcpy(last, codes + i, end - i);
    store(decoded, fused(entries(starts, slopes, last), scale, offset));
    for (int j = 0; i < end; i++, j++) out[i] = decoded[j];
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
  kOne,       // one value per 128 weights: blocks of a multiple of 128, repeated, and rows of whole chunks
};
constexpr int64_t elements_of(Scaling scaling) {
  return scaling == Scaling::kHalves ? 64 : scaling == Scaling::kQuarters ? 32 : scaling == Scaling::kEighths ? 16 : 128;
}

// The scales of a stream of rows. They are decoded for some rows at a time, because a row of a small model has few.
class Scales {
 public:
  Scales(const Weight& w, Scaling scaling, float* scratch)
      : w_(w), each_(elements_of(scaling)), scratch_(scratch) {}

  // Floats of scratch: absmax and offsets, and both repeated.
  static int64_t room(const Weight& w) { return 2 * part(w) + (w.zero ? 2 * part(w) : 0); }

  // The scales of row n, the first of which is that of its start. `last` ends the stream.
  QCLI_INLINE const float* of_row(int64_t n, int64_t last) {
    if (n >= end_) decode(n, last);
    return scales_ + (n - first_) * (w_.k / each_);
  }
  // What zero points add to its weights, likewise; null without zero points. After of_row.
  QCLI_INLINE const float* offsets_of_row(int64_t n) const {
    return w_.zero ? offsets_ + (n - first_) * (w_.k / each_) : nullptr;
  }

 private:
  static int64_t part(const Weight& w) { return larger(kScales, 2 * (w.k / 16) + 4); }

  void decode(int64_t n, int64_t last) {
    const int64_t k = w_.k, bs = w_.block_size;
    const bool repeat = bs != each_;
    const int64_t per_row = repeat ? k / each_ : divide_up(k, bs) + 1;
    first_ = n;
    end_ = smaller(last, n + larger<int64_t>(1, kScales / per_row));
    first_block_ = n * k / bs;
    const int64_t count = divide_up(end_ * k, bs) - first_block_;
    const int64_t width = w_.lines ? 1 : w_.absmax_dtype == kFloat32 ? 4 : w_.absmax_dtype <= kFloat16 ? 2 : 1;
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

  // A value per each_ weights of one per block.
  const float* repeated(const float* values, float* to) const {
    const int64_t times = w_.block_size / each_;
    int64_t block = 0, into = first_ * w_.k / each_ - first_block_ * times;
    for (int64_t i = 0; i < (end_ - first_) * (w_.k / each_); i++) {
      to[i] = values[block];
      if (++into == times) {
        into = 0;
        block++;
      }
    }
    return to;
  }

  const Weight& w_;
  int64_t each_;  // weights that share a value
  float* scratch_;
  const float* scales_ = nullptr;
  const float* offsets_ = nullptr;
  int64_t first_ = 0, end_ = 0, first_block_ = 0;
};

struct Row {
  const uint8_t* packed;
  const float* scales;
  const float* offsets;  // null without zero points

  template <Scaling kScaling>
  QCLI_INLINE int64_t block_of(int64_t i) const {
    return i / elements_of(kScaling);
  }
  // The scales, or the offsets, of the chunk at i, in lanes. Those beyond the row's end are zero: what is read there is another row's.
  template <Scaling kScaling, bool kWhole>
  QCLI_INLINE F32x16 of_chunk(const Weight& w, const float* values, int64_t i) const {
    const float* at = values + block_of<kScaling>(i);
    if (kWhole) {
      if (kScaling == Scaling::kHalves) return halves(at[0], at[1]);
      if (kScaling == Scaling::kQuarters) return quarters(at);
      return kScaling == Scaling::kEighths ? eighths(at) : all(at[0]);
    }
    if (kScaling == Scaling::kHalves) return halves(at[0], 0.0f);
    constexpr int kEach = kScaling == Scaling::kEighths ? 16 : 32;
    float some[kChunk / kEach] = {};
    for (int q = 0; i + kEach * q < w.k; q++) some[q] = values[block_of<kScaling>(i + kEach * q)];
    return kEach == 16 ? eighths(some) : quarters(some);
  }
};

template <class T>
QCLI_INLINE void put(const float* sums, int tokens, const Weight& w, int64_t n, T* y) {
  const float bias = w.bias.at(n);
  for (int t = 0; t < tokens; t++) from_float(sums[t] + bias, &y[t * w.out_features + n]);
}

}  // namespace
