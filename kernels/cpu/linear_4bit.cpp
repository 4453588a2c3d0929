// The product with a 4-bit weight for few tokens. The weight is never expanded in memory.
//
//   y[t, n] = sum_k x[t, k] * (code[c[n, k]] - zero[b] / 8) * absmax[b]  +  bias[n],   b = (n K + k) / block_size
//
// Reads half a byte per weight, and 1 to 4 bytes of absmax per block. A chunk of 128 weights is decoded by table look-up and
// multiplied in 16 lanes. absmax scales its sums once, and rows are summed in float32. x is reordered once, to the order in which
// look-ups decode the weights. A row's last chunk may be partial: x is padded with zeros. A zero point takes its share of the sum of
// x in each lane, which is made once for all rows.
//
// Products are float32, or of 16-bit integers: see chunks.h.
//
// Where a row or a block is no multiple of 32, or a row is shorter than a chunk, a row is expanded in L1 and multiplied there.

#include "chunks.h"

namespace {

constexpr int64_t kAhead = 1024;   // bytes
constexpr int kPieces = 2;         // pieces of rows per thread; few, because each begins with streams that are not prefetched
constexpr int64_t kScales = 1024;  // absmax values that are decoded at a time for a stream of rows

// Tokens share decoded weights and rows share loaded x, as far as registers allow. Rows that are multiplied together are far apart,
// so memory fetches as many streams at once.
constexpr int kTokens = 4, kRows = 4;

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

// The hardware's own prefetching stops at page borders and is slower than the arithmetic.
QCLI_INLINE I32x16 load_chunk(const uint8_t* p) {
  __builtin_prefetch(p + kAhead);
  return load_ints(p);
}

using Floats = Float32<NibbleOrder>;
#if defined(QCLI_INT16_PRODUCTS)
// x, and the table of codes.
class Int16 : public Integers<NibbleOrder> {
 public:
  template <class T>
  Int16(const T* x, int64_t rows, const Weight& w)
      : Integers(x, rows, w.k, w.zero != nullptr), codes_(codes_of(w.code, kCodeSteps)) {}
  const Codes16& codes() const { return codes_; }

 private:
  Codes16 codes_;
};
#endif

template <int j, int kT, int kR>
QCLI_INLINE void add_step(Table16 table, const I32x16* chunk, const float* const* x, F32x16 (*sums)[kT]) {
  for (int r = 0; r < kR; r++) {
    const F32x16 weights = look_up<4 * j>(table, chunk[r]);
    for (int s = 0; s < kT; s++) {
      const F32x16 values = load(x[s] + 16 * j);
      sums[r][s] = j ? fused(weights, values, sums[r][s]) : weights * values;
    }
  }
}

// totals += chunk * scales, for the chunk at i of kR rows and kT tokens from t on.
template <int kT, int kR>
QCLI_INLINE void add(Table16 table, const I32x16* chunk, const Floats& x, int64_t t, int64_t i, const F32x16* scales,
                     F32x16 (*totals)[kT]) {
  const float* values[kT];
  for (int s = 0; s < kT; s++) values[s] = x.at(t + s, i);
  F32x16 sums[kR][kT];
  add_step<0, kT, kR>(table, chunk, values, sums);
  add_step<1, kT, kR>(table, chunk, values, sums);
  add_step<2, kT, kR>(table, chunk, values, sums);
  add_step<3, kT, kR>(table, chunk, values, sums);
  add_step<4, kT, kR>(table, chunk, values, sums);
  add_step<5, kT, kR>(table, chunk, values, sums);
  add_step<6, kT, kR>(table, chunk, values, sums);
  add_step<7, kT, kR>(table, chunk, values, sums);
  for (int r = 0; r < kR; r++) {
    for (int s = 0; s < kT; s++) totals[r][s] = fused(sums[r][s], scales[r], totals[r][s]);
  }
}

// kR rows times kT tokens from t on: sums[r][s].
template <int kT, int kR, Scaling kScaling>
void products(const Weight& w, const Row* rows, const Floats& x, int64_t t, float (*sums)[kTokens]) {
  const Table16 table = table16(w.code);
  F32x16 totals[kR][kT];
  for (int r = 0; r < kR; r++) {
    for (int s = 0; s < kT; s++) totals[r][s] = all(0.0f);
  }
  const auto step = [&](int64_t i) {
    I32x16 chunk[kR];
    F32x16 scales[kR];
    for (int r = 0; r < kR; r++) {
      chunk[r] = load_chunk(rows[r].packed + i / 2);
      scales[r] = rows[r].of_chunk<kScaling>(w, rows[r].scales, i);
    }
    add<kT, kR>(table, chunk, x, t, i, scales, totals);
    if (!w.zero) return;
    for (int r = 0; r < kR; r++) {
      const F32x16 offsets = rows[r].of_chunk<kScaling>(w, rows[r].offsets, i);
      for (int s = 0; s < kT; s++) totals[r][s] = fused(load(x.sums(t + s, i)), offsets, totals[r][s]);
    }
  };
  const int64_t whole = w.k / kChunk * kChunk;
  for (int64_t i = 0; i < whole; i += kChunk) step(i);
  if (whole < w.k) step(whole);
  for (int r = 0; r < kR; r++) {
    for (int s = 0; s < kT; s++) sums[r][s] = sum_lanes(totals[r][s]);
  }
}

#if defined(QCLI_INT16_PRODUCTS)
// What outliers of x add to the product of a row.
template <Scaling kScaling>
float outliers_of(const Weight& w, const Row& row, const Int16& x, int64_t t) {
  float sum = 0.0f;
  for (int64_t o = 0; o < x.outliers(t); o++) {
    const Outlier each = x.outlier(t, o);
    const int code = row.packed[each.i / 2] >> (each.i % 2 ? 0 : 4) & 15;
    sum += each.value * w.code[code] * row.template scale_of<kScaling>(w, each.i);
    if (w.zero) sum += each.value * row.offsets[row.template block_of<kScaling>(w, each.i)];
  }
  return sum;
}

// The scales, or the offsets, of kWide elements at i. Those beyond the row's end are zero: what is read there is another row's.
template <Scaling kScaling, bool kWhole>
QCLI_INLINE Lanes of_lanes(const Weight& w, const Row& row, const float* values, int64_t i) {
#if defined(__AVX512F__)
  if (kScaling == Scaling::kEighths) return {row.of_chunk<kScaling>(w, values, i).v};
#endif
  float q[kWide / 32];
  for (int j = 0; j < kWide / 32; j++) {
    q[j] = kWhole || i + 32 * j < w.k ? values[row.block_of<kScaling>(w, i + 32 * j)] : 0.0f;
  }
#if defined(__AVX512F__)
  return kWhole && kScaling == Scaling::kOne ? lanes_of(q[0]) : lanes_of(q[0], q[1], q[2], q[3]);
#else
  return kWhole && kScaling != Scaling::kQuarters ? lanes_of(q[0]) : lanes_of(q[0], q[1]);
#endif
}

// Where a token's integers and steps are.
struct Token {
  const int16_t* values;
  const float* steps;
  const float* sums;  // of eight elements each, if there are zero points
};

// One register of codes of kR rows at i.
template <int kT, int kR, Scaling kScaling, bool kWhole>
QCLI_INLINE void add_wide(const Weight& w, const Row (&rows)[kR], const Token (&tokens)[kT], const Codes16& codes, int64_t i,
                          Lanes (&totals)[kR][kT]) {
  for (int r = 0; r < kR; r++) {
    const uint8_t* p = rows[r].packed + i / 2;
    __builtin_prefetch(p + kAhead);
    const Packed packed = load_packed(p);
    Words weights[2];
    Sums sums[kT];
    look_up_half<0>(codes, packed, weights);
    for (int s = 0; s < kT; s++) {
      const int16_t* values = tokens[s].values + i;
      sums[s] = add_dot(dot(weights[0], load_words(values)), weights[1], load_words(values + kWide / 2));
    }
    look_up_half<1>(codes, packed, weights);
    const Lanes scales = of_lanes<kScaling, kWhole>(w, rows[r], rows[r].scales, i);
    for (int s = 0; s < kT; s++) {
      const int16_t* values = tokens[s].values + i + kWide / 4;
      sums[s] = add_dot(add_dot(sums[s], weights[0], load_words(values)), weights[1], load_words(values + kWide / 2));
      totals[r][s] = add_scaled(totals[r][s], sums[s], times(scales, tokens[s].steps[i / kWide]));
    }
    if (!w.zero) continue;
    const Lanes offsets = of_lanes<kScaling, kWhole>(w, rows[r], rows[r].offsets, i);
    for (int s = 0; s < kT; s++) totals[r][s] = add_product(totals[r][s], load_lanes(tokens[s].sums + i / 8), offsets);
  }
}

template <int kT, int kR, Scaling kScaling>
void products(const Weight& w, const Row* all_rows, const Int16& x, int64_t t, float (*sums)[kTokens]) {
  const Codes16 codes = x.codes();
  Row rows[kR];
  Token tokens[kT];
  Lanes totals[kR][kT];
  for (int r = 0; r < kR; r++) rows[r] = all_rows[r];
  for (int s = 0; s < kT; s++) tokens[s] = {x.at(t + s, 0), x.steps(t + s), x.sums(t + s)};
  for (int r = 0; r < kR; r++) {
    for (int s = 0; s < kT; s++) totals[r][s] = no_lanes();
  }
  const int64_t k = w.k;
  int64_t i = 0;
  for (; i + kWide <= k; i += kWide) add_wide<kT, kR, kScaling, true>(w, rows, tokens, codes, i, totals);
  if (i < k) add_wide<kT, kR, kScaling, false>(w, rows, tokens, codes, i, totals);
  for (int r = 0; r < kR; r++) {
    for (int s = 0; s < kT; s++) sums[r][s] = sum_lanes(totals[r][s]);
  }
  for (int s = 0; s < kT; s++) {
    if (!x.outliers(t + s)) continue;
    for (int r = 0; r < kR; r++) sums[r][s] += outliers_of<kScaling>(w, rows[r], x, t + s);
  }
}
#endif

template <int kT, Scaling kScaling, class X>
void products(int count, const Weight& w, const Row* rows, const X& x, int64_t t, float (*sums)[kTokens]) {
  if (count == 4 && kT <= 2) {
    products<kT, 4, kScaling>(w, rows, x, t, sums);
    return;
  }
  for (int r = 0; r < count; r += 2) {
    if (count - r > 1) {
      products<kT, 2, kScaling>(w, rows + r, x, t, sums + r);
    } else {
      products<kT, 1, kScaling>(w, rows + r, x, t, sums + r);
    }
  }
}

template <Scaling kScaling, class X>
void products(int tokens, int count, const Weight& w, const Row* rows, const X& x, int64_t t, float (*sums)[kTokens]) {
  switch (tokens) {
    case 1: products<1, kScaling>(count, w, rows, x, t, sums); break;
    case 2: products<2, kScaling>(count, w, rows, x, t, sums); break;
    case 3: products<3, kScaling>(count, w, rows, x, t, sums); break;
    default: products<kTokens, kScaling>(count, w, rows, x, t, sums); break;
  }
}

// Expands a row to float32, for any start and any block size. `pairs` has the two values of every byte.
void expand_row(const Weight& w, int64_t n, const float* scales, int64_t first_block, const float (*pairs)[2], float* out) {
  int64_t i = n * w.k;
  const int64_t end = i + w.k;
  while (i < end) {
    const int64_t block = i / w.block_size;
    const float scale = scales[block - first_block], zero = w.zero ? float(w.zero[block]) * 0.125f : 0.0f;
    const int64_t stop = smaller(end, (block + 1) * w.block_size);
    if (i % 2) *out++ = (pairs[w.packed[i++ / 2]][1] - zero) * scale;
    for (; i + 2 <= stop; i += 2, out += 2) {
      const float* pair = pairs[w.packed[i / 2]];
      out[0] = (pair[0] - zero) * scale;
      out[1] = (pair[1] - zero) * scale;
    }
    if (i < stop) *out++ = (pairs[w.packed[i++ / 2]][0] - zero) * scale;
  }
}

float dot(const float* x, const float* w, int64_t padded) {
  F32x16 a = all(0.0f), b = a;
  for (int64_t i = 0; i < padded; i += 32) {
    a = fused(load(x + i), load(w + i), a);
    b = fused(load(x + i + 16), load(w + i + 16), b);
  }
  return sum_lanes(a + b);
}

template <class T>
QCLI_INLINE void put(const float* sums, int tokens, const Weight& w, int64_t n, T* y) {
  const float bias = w.bias.at(n);
  for (int t = 0; t < tokens; t++) from_float(sums[t] + bias, &y[t * w.out_features + n]);
}

template <Scaling kScaling, class T, class X>
void linear_in_chunks(const X& x, int64_t tokens, const Weight& w, T* y, int threads) {
  const int64_t k = w.k, bytes = w.out_features * k / 2, grain = divide_up(w.out_features, kPieces * larger(threads, 1));
  parallel(w.out_features, grain, threads, [=, &w, &x](int64_t first, int64_t last) {
    const int64_t apart = divide_up(last - first, kRows), room = Scales::room(w);
    const Scratch scratch(4 * kRows * room + x.padded() / 2);
    uint8_t* const copy = reinterpret_cast<uint8_t*>(scratch.as<float>() + kRows * room);
    Scales scales[kRows] = {
        {w, kScaling, scratch.as<float>()},
        {w, kScaling, scratch.as<float>() + room},
        {w, kScaling, scratch.as<float>() + 2 * room},
        {w, kScaling, scratch.as<float>() + 3 * room},
    };
    for (int64_t i = first; i < first + apart; i++) {
      Row rows[kRows];
      int count = 0;
      for (int64_t n = i; n < last; n += apart, count++) {
        const int64_t start = n * k;
        const float* own = scales[count].of_row(n, smaller(last, first + (count + 1) * apart));
        rows[count] = {w.packed + start / 2, own, scales[count].offsets_of_row(n), kScaling == Scaling::kOne ? start % w.block_size : 0};
        // The load of the last chunk must stay within the weight.
        if ((start + x.padded()) / 2 > bytes) rows[count].packed = static_cast<uint8_t*>(memcpy(copy, rows[count].packed, k / 2));
      }
      for (int64_t t = 0; t < tokens; t += kTokens) {
        const int some = int(smaller<int64_t>(kTokens, tokens - t));
        float sums[kRows][kTokens];
        products<kScaling>(some, count, w, rows, x, t, sums);
        for (int r = 0; r < count; r++) put(sums[r], some, w, i + r * apart, y + t * w.out_features);
      }
    }
  });
}

template <class T, class X>
void linear_in_chunks(const X& x, int64_t tokens, const Weight& w, T* y, int threads) {
  if (w.block_size == 16) {
    linear_in_chunks<Scaling::kEighths>(x, tokens, w, y, threads);
  } else if (w.block_size == 64 && w.k % 64 == 0) {
    linear_in_chunks<Scaling::kHalves>(x, tokens, w, y, threads);
  } else if (w.block_size % kChunk == 0 && w.k % kChunk == 0) {
    linear_in_chunks<Scaling::kOne>(x, tokens, w, y, threads);
  } else {
    linear_in_chunks<Scaling::kQuarters>(x, tokens, w, y, threads);
  }
}

template <class T>
void linear_in_floats(const T* x, int64_t tokens, const Weight& w, T* y, int threads) {
  linear_in_chunks(Floats(x, tokens, w.k, w.zero != nullptr), tokens, w, y, threads);
}

#if defined(QCLI_INT16_PRODUCTS)
// For many tokens: rows are decoded to 16-bit integers once, and multiplied with kManyTokens tokens at a time. Tokens go by blocks
// that L2 holds.
constexpr int kManyRows = 4, kManyTokens = 3;
constexpr int64_t kFewTokens = 12;       // up to here decoding for every four tokens is as fast
constexpr int64_t kTokenBytes = 256000;  // of a block of tokens

// A row in the order of x, and the scales of each kWide of its elements.
template <Scaling kScaling>
void decode_row(const Weight& w, const Row& row, const Codes16& codes, int16_t* to, Lanes* scales) {
  for (int64_t i = 0; i < w.k; i += kWide, to += kWide) {
    const uint8_t* p = row.packed + i / 2;
    __builtin_prefetch(p + kAhead);
    const Packed packed = load_packed(p);
    Words weights[2];
    look_up_half<0>(codes, packed, weights);
    store_words(to, weights[0]);
    store_words(to + kWide / 2, weights[1]);
    look_up_half<1>(codes, packed, weights);
    store_words(to + kWide / 4, weights[0]);
    store_words(to + kWide * 3 / 4, weights[1]);
    *scales++ = i + kWide <= w.k ? of_lanes<kScaling, true>(w, row, row.scales, i) : of_lanes<kScaling, false>(w, row, row.scales, i);
  }
}

// What outliers of x add to the product of a row, whose scales are in lanes.
float outliers_of_decoded(const Weight& w, const uint8_t* packed, const Lanes* scales, const Int16& x, int64_t t) {
  const float* lanes = reinterpret_cast<const float*>(scales);  // kWide / 8 per register, four for every 32 elements
  float sum = 0.0f;
  for (int64_t o = 0; o < x.outliers(t); o++) {
    const Outlier each = x.outlier(t, o);
    const int code = packed[each.i / 2] >> (each.i % 2 ? 0 : 4) & 15;
    sum += each.value * w.code[code] * lanes[each.i / kWide * (kWide / 8) + each.i % kWide / 32 * 4];
  }
  return sum;
}

// sums[r][s] for kManyRows decoded rows and kT tokens.
template <int kT>
void products_of_decoded(const int16_t* decoded, const Lanes* scales, int64_t padded, const Int16& x, int64_t t,
                         float (*sums)[kManyTokens]) {
  Token tokens[kT];
  Lanes totals[kManyRows][kT];
  for (int s = 0; s < kT; s++) tokens[s] = {x.at(t + s, 0), x.steps(t + s), nullptr};
  for (int r = 0; r < kManyRows; r++) {
    for (int s = 0; s < kT; s++) totals[r][s] = no_lanes();
  }
  for (int64_t i = 0; i < padded; i += kWide) {
#pragma GCC unroll 4
    for (int r = 0; r < kManyRows; r++) {
      const int16_t* row = decoded + r * padded + i;
      Sums some[kT];
      const Words first = load_words(row);
      for (int s = 0; s < kT; s++) some[s] = dot(first, load_words(tokens[s].values + i));
#pragma GCC unroll 3
      for (int j = 1; j < 4; j++) {
        const Words weights = load_words(row + j * (kWide / 4));
        for (int s = 0; s < kT; s++) some[s] = add_dot(some[s], weights, load_words(tokens[s].values + i + j * (kWide / 4)));
      }
      const Lanes scale = scales[r * (padded / kWide) + i / kWide];
      for (int s = 0; s < kT; s++) totals[r][s] = add_scaled(totals[r][s], some[s], times(scale, tokens[s].steps[i / kWide]));
    }
  }
  for (int r = 0; r < kManyRows; r++) {
    for (int s = 0; s < kT; s++) sums[r][s] = sum_lanes(totals[r][s]);
  }
}

template <Scaling kScaling, class T>
void linear_of_many(const Int16& x, int64_t tokens, const Weight& w, T* y, int threads) {
  const int64_t k = w.k, bytes = w.out_features * k / 2, padded = x.padded(), groups = divide_up(w.out_features, kManyRows);
  const int64_t grain = larger<int64_t>(1, divide_up(groups, 4 * larger(threads, 1)));
  parallel(groups, grain, threads, [=, &w, &x](int64_t first, int64_t last) {
    const int64_t n_scales = padded / kWide;
    const Scratch scratch(4 * Scales::room(w) + kManyRows * (2 * padded + int64_t(sizeof(Lanes)) * n_scales + padded / 2));
    Lanes* const lanes = scratch.as<Lanes>();
    int16_t* const decoded = reinterpret_cast<int16_t*>(lanes + kManyRows * n_scales);
    float* const of_scales = reinterpret_cast<float*>(decoded + kManyRows * padded);
    uint8_t* const copies = reinterpret_cast<uint8_t*>(of_scales + Scales::room(w));
    Scales scales(w, kScaling, of_scales);
    const int64_t end = smaller(w.out_features, last * kManyRows);
    for (int64_t n = first * kManyRows; n < end; n += kManyRows) {
      const int count = int(smaller<int64_t>(kManyRows, end - n));
      Row rows[kManyRows];
      for (int r = 0; r < kManyRows; r++) {
        const int64_t row = n + smaller(r, count - 1), start = row * k;  // a row that is not there is another one
        rows[r] = {w.packed + start / 2, nullptr, nullptr, kScaling == Scaling::kOne ? start % w.block_size : 0};
        // The load of the last codes must stay within the weight.
        if ((start + padded) / 2 > bytes) {
          rows[r].packed = static_cast<uint8_t*>(memcpy(copies + r * (padded / 2), rows[r].packed, k / 2));
        }
      }
      // The scales of a row may be overwritten when those of a later one are decoded, so each row's are used at once.
      for (int r = 0; r < kManyRows; r++) {
        const int64_t row = n + smaller(r, count - 1);
        rows[r].scales = scales.of_row(row, end);
        decode_row<kScaling>(w, rows[r], x.codes(), decoded + r * padded, lanes + r * n_scales);
      }
      for (int64_t t = 0; t < tokens; t += kManyTokens) {
        const int some = int(smaller<int64_t>(kManyTokens, tokens - t));
        float sums[kManyRows][kManyTokens];
        switch (some) {
          case 1: products_of_decoded<1>(decoded, lanes, padded, x, t, sums); break;
          case 2: products_of_decoded<2>(decoded, lanes, padded, x, t, sums); break;
          default: products_of_decoded<kManyTokens>(decoded, lanes, padded, x, t, sums); break;
        }
        for (int r = 0; r < count; r++) {
          for (int s = 0; s < some; s++) {
            if (x.outliers(t + s)) sums[r][s] += outliers_of_decoded(w, rows[r].packed, lanes + r * n_scales, x, t + s);
          }
          put(sums[r], some, w, n + r, y + t * w.out_features);
        }
      }
    }
  });
}

template <class T>
void linear_of_many(const Int16& x, int64_t tokens, const Weight& w, T* y, int threads) {
  if (w.block_size == 64 && w.k % 64 == 0) {
    linear_of_many<Scaling::kHalves>(x, tokens, w, y, threads);
  } else if (w.block_size % kChunk == 0 && w.k % kChunk == 0) {
    linear_of_many<Scaling::kOne>(x, tokens, w, y, threads);
  } else {
    linear_of_many<Scaling::kQuarters>(x, tokens, w, y, threads);
  }
}
#endif

template <class T>
void linear_by_rows(const T* x, int64_t tokens, const Weight& w, T* y, int threads) {
  const int64_t k = w.k, padded = divide_up(k, 32) * 32;
  const Scratch wide(4 * tokens * padded);
  for (int64_t t = 0; t < tokens; t++) {
    float* to = wide.as<float>() + t * padded;
    for (int64_t i = 0; i < padded; i++) to[i] = i < k ? to_float(x[t * k + i]) : 0.0f;
  }
  float pairs[256][2];
  for (int byte = 0; byte < 256; byte++) {
    pairs[byte][0] = w.code[byte >> 4];
    pairs[byte][1] = w.code[byte & 15];
  }
  const float* values = wide.as<float>();
  parallel(w.out_features, divide_up(w.out_features, kPieces * larger(threads, 1)), threads, [=, &w, &pairs](int64_t first, int64_t last) {
    const Scratch expanded(4 * padded), scratch(4 * (k / w.block_size + 2));
    float* row = expanded.as<float>();
    for (int64_t i = k; i < padded; i++) row[i] = 0;
    for (int64_t n = first; n < last; n++) {
      const int64_t first_block = n * k / w.block_size, blocks = divide_up((n + 1) * k, w.block_size) - first_block;
      expand_row(w, n, absmax_of_blocks(w, first_block, blocks, scratch.as<float>()), first_block, pairs, row);
      for (int64_t t = 0; t < tokens; t++) {
        const float sum = dot(values + t * padded, row, padded);
        put(&sum, 1, w, n, y + t * w.out_features);
      }
    }
  });
}

template <class T>
void linear(const void* input, int64_t tokens, const Weight& w, void* output, int threads) {
  const T* x = static_cast<const T*>(input);
  T* y = static_cast<T*>(output);
  if (w.k % 32 || (w.block_size % 32 && w.block_size != 16) || w.k < kChunk) {
    linear_by_rows(x, tokens, w, y, threads);
    return;
  }
#if defined(QCLI_INT16_PRODUCTS)
  // The lanes of a register of 64 codes are not of one block of 16 each.
  if (w.coarse && (w.block_size != 16 || kWide == kChunk)) {
    const int64_t together = tokens > kFewTokens ? larger(kFewTokens, kTokenBytes / (2 * w.k)) : tokens;
    for (; tokens > 0; tokens -= together, x += together * w.k, y += together * w.out_features) {
      const int64_t some = smaller(together, tokens);
      const Int16 laid_out(x, some, w);
      if (!laid_out.usable()) {
        linear_in_floats(x, some, w, y, threads);
      } else if (some > kFewTokens && !w.zero && w.block_size != 16) {
        linear_of_many(laid_out, some, w, y, threads);
      } else {
        linear_in_chunks(laid_out, some, w, y, threads);
      }
    }
    return;
  }
#endif
  linear_in_floats(x, tokens, w, y, threads);
}

}  // namespace

// x [tokens, k] and y [tokens, out_features] of `dtype`.
QCLI_KERNEL(linear_4bit)(const void* x, int dtype, int64_t tokens, const void* weight, void* y, int threads) {
  QCLI_DISPATCH(dtype, linear, x, tokens, *static_cast<const Weight*>(weight), y, threads)
}

QCLI_LINEAR_STEP(linear_4bit_step, linear<float>)
