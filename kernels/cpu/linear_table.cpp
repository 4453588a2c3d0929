// The product with a weight of 2, 3 or 4 bits whose codes name entries of a table, for few tokens; the definition is in
// qcli/ops/linear_table.py.
//
//   y[t, n] = sum_k x[t, k] (table[c[n, k]] - zero[n, g]) * absmax[n, g]  +  bias[n],   g = k / block_size
//
// Reads 2 to 4 bits per weight. Codes are brought to nibbles in registers (planes.h), and looked up there as those of linear_4bit are.
// With the compute dtype bfloat16 x and the tables are 16-bit integers, as chunks.h says; a table's steps are its largest magnitude /
// 8064. Otherwise they are float32. What zero points take is made of the sums of x over groups.
//
// Where a group is no multiple of 32 columns, a row is expanded in L1 and multiplied there.

#include "planes.h"

namespace {

constexpr int64_t kAhead = 1024;  // bytes
constexpr int kPieces = 2;        // pieces of rows per thread; few, because each begins with streams that are not prefetched

// Tokens share decoded weights. Rows that are multiplied together are far apart, so memory fetches as many streams at once.
constexpr int kTokens = 4, kRows = 4;

// The layout is that of the Record in qcli/ops/linear_table.py.
struct Weight {
  const uint8_t* packed;  // [out_features, row_bytes()]
  const float* table;     // [2^bits], or [out_features, 2^bits]
  const float* absmax;    // [out_features, groups], or null
  const float* zero;      // likewise
  Bias bias;              // [out_features]
  int64_t bits, own_tables, block_size, out_features, k;
  int32_t coarse;  // the compute dtype is bfloat16

  QCLI_INLINE int64_t row_bytes() const { return divide_up(k, kUnit) * unit_bytes(int(bits)); }
  QCLI_INLINE int64_t groups() const { return divide_up(k, block_size); }
  QCLI_INLINE const float* table_of(int64_t n) const { return table + (own_tables ? n << bits : 0); }
};

struct Output {
  void* y;
  int dtype;
  QCLI_INLINE void put(int64_t i, float value) const {
    switch (dtype) {
      case kFloat32: static_cast<float*>(y)[i] = value; break;
      case kBFloat16: from_float(value, static_cast<bf16*>(y) + i); break;
      default: from_float(value, static_cast<f16*>(y) + i); break;
    }
  }
};

using Floats = Float32<PlaneOrder>;

// Which weights share a scale.
enum class Scaling { kRow, kUnits, kHalves };  // those of a row, of units of 64 columns at least, of 32 columns at least

struct Row {
  const uint8_t* packed;
  const float* absmax;  // of its groups, or null
  float entries[16];
#if defined(QCLI_INT16_PRODUCTS)
  Codes16 codes;
  float unit;  // of the entries in codes, times kCodeSteps
#endif

  QCLI_INLINE float scale(int32_t group) const { return absmax ? absmax[group] : 1.0f; }
};

#if defined(QCLI_INT16_PRODUCTS)
// Integers in a table stay integers: the number of steps to 1 is rounded down to a whole one.
QCLI_INLINE void round_table(const float* entries, Codes16* codes, float* unit) {
  const float steps = kCodeSteps / larger(absmax_of(entries, 16), 1e-30f), whole = float(int32_t(smaller(steps, 1e9f)));
  const float scale = whole >= 1 ? larger(whole, steps - 1) : steps;
  *codes = codes_of(entries, scale);
  *unit = kCodeSteps / scale;
}
#endif

// What does not depend on rows.
template <class X>
struct Given {
  const Weight& w;
  const X& x;
  const int32_t* groups;  // of every 32 columns, up to whole chunks
};

template <int kBits, Scaling kScaling, int kT, int kR>
void products(const Given<Floats>& given, const Row* rows, int64_t t, float (*sums)[kTokens]) {
  const Floats& x = given.x;
  F32x16 totals[kR][kT];
  for (int r = 0; r < kR; r++) {
    for (int s = 0; s < kT; s++) totals[r][s] = all(0.0f);
  }
  for (int64_t i = 0; i < given.w.k; i += kChunk) {
    for (int r = 0; r < kR; r++) {
      const uint8_t* p = rows[r].packed + i / kUnit * unit_bytes(kBits);
      __builtin_prefetch(p + kAhead);
      const I32x16 chunk = nibbles<kBits>(p);
      const Table16 table = table16(rows[r].entries);
      F32x16 some[2][kT];  // of the first halves of units, and of the second ones
      const auto step = [&](int j, F32x16 weights) __attribute__((always_inline)) {
        for (int s = 0; s < kT; s++) {
          const F32x16 values = load(x.at(t + s, i) + 16 * j);
          some[j % 2][s] = j < 2 ? weights * values : fused(weights, values, some[j % 2][s]);
        }
      };
      step(0, look_up<0>(table, chunk));
      step(1, look_up<4>(table, chunk));
      step(2, look_up<8>(table, chunk));
      step(3, look_up<12>(table, chunk));
      step(4, look_up<16>(table, chunk));
      step(5, look_up<20>(table, chunk));
      step(6, look_up<24>(table, chunk));
      step(7, look_up<28>(table, chunk));
      if (kScaling == Scaling::kRow) {
        for (int s = 0; s < kT; s++) totals[r][s] = totals[r][s] + (some[0][s] + some[1][s]);
        continue;
      }
      const int32_t* group = given.groups + i / 32;
      for (int half = 0; half < 2; half++) {
        const F32x16 scales = halves(rows[r].scale(group[half]), rows[r].scale(group[2 + half]));
        for (int s = 0; s < kT; s++) totals[r][s] = fused(some[half][s], scales, totals[r][s]);
      }
    }
  }
  for (int r = 0; r < kR; r++) {
    for (int s = 0; s < kT; s++) sums[r][s] = sum_lanes(totals[r][s]) * (kScaling == Scaling::kRow ? rows[r].scale(0) : 1.0f);
  }
}

#if defined(QCLI_INT16_PRODUCTS)
using Ints = Integers<PlaneOrder>;

// The scales of a register of codes at i: of the first or the second halves of its units.
QCLI_INLINE Lanes of_lanes(const Row& row, const int32_t* group) {
#if defined(__AVX512F__)
  return {halves(row.scale(group[0]), row.scale(group[2])).v};
#else
  return lanes_of(row.scale(group[0]));
#endif
}

template <int kBits, Scaling kScaling, int kT, int kR>
void products(const Given<Ints>& given, const Row* all_rows, int64_t t, float (*sums)[kTokens]) {
  const Ints& x = given.x;
  const int64_t k = given.w.k;
  Row rows[kR];
  const int16_t* values[kT];
  const float* steps[kT];
  Lanes totals[kR][kT];
  for (int r = 0; r < kR; r++) rows[r] = all_rows[r];
  for (int s = 0; s < kT; s++) {
    values[s] = x.at(t + s, 0);
    steps[s] = x.steps(t + s);
  }
  for (int r = 0; r < kR; r++) {
    for (int s = 0; s < kT; s++) totals[r][s] = no_lanes();
  }
  for (int64_t i = 0; i < k; i += kWide) {
    for (int r = 0; r < kR; r++) {
      const uint8_t* p = rows[r].packed + i / kUnit * unit_bytes(kBits);
      __builtin_prefetch(p + kAhead);
      const Packed packed = packed_nibbles<kBits>(p);
      const int32_t* group = given.groups + i / 32;
      Words weights[2];
      Sums some[kT];
      look_up_half<0>(rows[r].codes, packed, weights);
      for (int s = 0; s < kT; s++) {
        some[s] = add_dot(dot(weights[0], load_words(values[s] + i)), weights[1], load_words(values[s] + i + kWide / 2));
        if (kScaling != Scaling::kHalves) continue;
        totals[r][s] = add_scaled(totals[r][s], some[s], times(of_lanes(rows[r], group), steps[s][i / kWide]));
      }
      look_up_half<1>(rows[r].codes, packed, weights);
      for (int s = 0; s < kT; s++) {
        const int16_t* from = values[s] + i + kWide / 4;
        some[s] = kScaling == Scaling::kHalves ? dot(weights[0], load_words(from)) : add_dot(some[s], weights[0], load_words(from));
        some[s] = add_dot(some[s], weights[1], load_words(from + kWide / 2));
        const float step = steps[s][i / kWide];
        const Lanes scale = kScaling == Scaling::kRow ? lanes_of(step) : times(of_lanes(rows[r], group + 1), step);
        totals[r][s] = add_scaled(totals[r][s], some[s], scale);
      }
    }
  }
  for (int r = 0; r < kR; r++) {
    const float factor = rows[r].unit * (kScaling == Scaling::kRow ? rows[r].scale(0) : 1.0f);
    for (int s = 0; s < kT; s++) {
      sums[r][s] = sum_lanes(totals[r][s]) * factor;
      for (int64_t o = 0; o < x.outliers(t + s); o++) {
        const Outlier each = x.outlier(t + s, o);
        const float scale = rows[r].scale(given.groups[each.i / 32]);
        sums[r][s] += each.value * rows[r].entries[code_at<kBits>(rows[r].packed, each.i)] * scale;
      }
    }
  }
}
#endif

template <int kBits, Scaling kScaling, int kT, class X>
void products(int count, const Given<X>& given, const Row* rows, int64_t t, float (*sums)[kTokens]) {
  if (kT == 1 && count == kRows) {
    products<kBits, kScaling, kT, kRows>(given, rows, t, sums);
    return;
  }
  for (int r = 0; r < count; r += 2) {
    if (count - r > 1) {
      products<kBits, kScaling, kT, 2>(given, rows + r, t, sums + r);
    } else {
      products<kBits, kScaling, kT, 1>(given, rows + r, t, sums + r);
    }
  }
}

// What zero points take from the product of a row with a token, whose sums over groups are `sums`.
QCLI_INLINE float of_zeros(const Weight& w, int64_t n, const float* sums) {
  const int64_t groups = w.groups();
  const float *zero = w.zero + n * groups, *absmax = w.absmax ? w.absmax + n * groups : nullptr;
  F32x16 lanes = all(0.0f);
  int64_t g = 0;
  for (; g + 16 <= groups; g += 16) {
    const F32x16 taken = load(zero + g) * load(sums + g);
    lanes = absmax ? fused(taken, load(absmax + g), lanes) : lanes + taken;
  }
  float total = sum_lanes(lanes);
  for (; g < groups; g++) total += zero[g] * sums[g] * (absmax ? absmax[g] : 1.0f);
  return total;
}

// The sums of x over groups: [tokens, groups].
template <class T>
void sum_groups(const T* x, int64_t tokens, const Weight& w, float* to) {
  for (int64_t t = 0; t < tokens; t++, x += w.k) {
    for (int64_t i = 0; i < w.k; i += w.block_size) {
      float sum = 0.0f;
      for (int64_t j = i; j < smaller(w.k, i + w.block_size); j++) sum += to_float(x[j]);
      *to++ = sum;
    }
  }
}

template <int kBits, Scaling kScaling, class X>
void linear_in_units(const Given<X>& given, int64_t tokens, const float* sums_of_groups, const Output& y, int threads) {
  const Weight& w = given.w;
  const int64_t row_bytes = w.row_bytes(), bytes = w.out_features * row_bytes, groups = w.groups();
  const int64_t read = padded_to_chunks(w.k) / kUnit * unit_bytes(kBits);  // a row, up to whole chunks
  const int64_t grain = divide_up(w.out_features, kPieces * larger(threads, 1));
  parallel(w.out_features, grain, threads, [=, &given, &w](int64_t first, int64_t last) {
    const int64_t apart = divide_up(last - first, kRows);
    const Scratch copies(kRows * read);
    Row rows[kRows];
    for (int64_t i = first; i < first + apart; i++) {
      int count = 0;
      for (int64_t n = i; n < last; n += apart, count++) {
        Row& row = rows[count];
        row.packed = w.packed + n * row_bytes;
        row.absmax = w.absmax ? w.absmax + n * groups : nullptr;
        if (w.own_tables || i == first) {
          repeat_table<kBits>(w.table_of(n), row.entries);
#if defined(QCLI_INT16_PRODUCTS)
          round_table(row.entries, &row.codes, &row.unit);
#endif
        }
        // The load of the last codes must stay within the weight.
        if (n * row_bytes + read > bytes) {
          row.packed = static_cast<uint8_t*>(memcpy(copies.as<uint8_t>() + count * read, row.packed, row_bytes));
        }
      }
      for (int64_t t = 0; t < tokens;) {
        const int some = tokens - t >= kTokens ? kTokens : tokens - t >= 2 ? 2 : 1;
        float sums[kRows][kTokens];
        switch (some) {
          case 1: products<kBits, kScaling, 1>(count, given, rows, t, sums); break;
          case 2: products<kBits, kScaling, 2>(count, given, rows, t, sums); break;
          default: products<kBits, kScaling, kTokens>(count, given, rows, t, sums); break;
        }
        for (int r = 0; r < count; r++) {
          const int64_t n = i + r * apart;
          for (int s = 0; s < some; s++) {
            const float less = w.zero ? of_zeros(w, n, sums_of_groups + (t + s) * groups) : 0.0f;
            y.put((t + s) * w.out_features + n, sums[r][s] - less + w.bias.at(n));
          }
        }
        t += some;
      }
    }
  });
}

template <int kBits, class X>
void linear_in_units(const X& x, int64_t tokens, const Weight& w, const float* sums, const Output& y, int threads) {
  const int64_t halves_of_units = padded_to_chunks(w.k) / 32;
  const Scratch groups(4 * halves_of_units);
  for (int64_t i = 0; i < halves_of_units; i++) groups.as<int32_t>()[i] = int32_t(smaller(32 * i, w.k - 1) / w.block_size);
  const Given<X> given = {w, x, groups.as<int32_t>()};
  if (w.block_size >= w.k) {
    linear_in_units<kBits, Scaling::kRow>(given, tokens, sums, y, threads);
  } else if (w.block_size % kUnit == 0) {
    linear_in_units<kBits, Scaling::kUnits>(given, tokens, sums, y, threads);
  } else {
    linear_in_units<kBits, Scaling::kHalves>(given, tokens, sums, y, threads);
  }
}

float dot(const float* x, const float* w, int64_t padded) {
  F32x16 sum = all(0.0f);
  for (int64_t i = 0; i < padded; i += 16) sum = fused(load(x + i), load(w + i), sum);
  return sum_lanes(sum);
}

template <int kBits, class T>
void linear_by_rows(const T* input, int64_t tokens, const Weight& w, const Output& y, int threads) {
  const int64_t k = w.k, bs = w.block_size, padded = padded_to_chunks(k);
  const Float32<NaturalOrder> x(input, tokens, k);
  parallel(w.out_features, divide_up(w.out_features, kPieces * larger(threads, 1)), threads, [=, &w, &x](int64_t first, int64_t last) {
    const Scratch expanded(4 * padded);
    float* const values = expanded.as<float>();
    memset(values, 0, 4 * padded);
    for (int64_t n = first; n < last; n++) {
      float entries[16];
      repeat_table<kBits>(w.table_of(n), entries);
      each_sixteen<kBits>(w.packed + n * w.row_bytes(), k, table16(entries), [&](int64_t i, int64_t, F32x16 some) { store(values + i, some); });
      for (int64_t i = 0; i < k; i++) {
        const int64_t g = n * w.groups() + i / bs;
        values[i] = (values[i] - (w.zero ? w.zero[g] : 0.0f)) * (w.absmax ? w.absmax[g] : 1.0f);
      }
      for (int64_t i = k; i < padded; i++) values[i] = 0.0f;
      for (int64_t t = 0; t < tokens; t++) y.put(t * w.out_features + n, dot(x.at(t, 0), values, padded) + w.bias.at(n));
    }
  });
}

template <int kBits, class T>
void linear_of_bits(const T* x, int64_t tokens, const Weight& w, const Output& y, int threads) {
  if (w.block_size % 32 && w.block_size < w.k) {
    linear_by_rows<kBits>(x, tokens, w, y, threads);
    return;
  }
  const Scratch sums(w.zero ? 4 * tokens * w.groups() : 0);
  if (w.zero) sum_groups(x, tokens, w, sums.as<float>());
#if defined(QCLI_INT16_PRODUCTS)
  if (w.coarse) {
    const Ints laid_out(x, tokens, w.k);
    if (laid_out.usable()) {
      linear_in_units<kBits>(laid_out, tokens, w, sums.as<float>(), y, threads);
      return;
    }
  }
#endif
  linear_in_units<kBits>(Floats(x, tokens, w.k), tokens, w, sums.as<float>(), y, threads);
}

template <class T>
void linear(const void* input, int64_t tokens, const Weight& w, void* output, int threads, int dtype = kFloat32) {
  const T* x = static_cast<const T*>(input);
  const Output y = {output, dtype};
  switch (w.bits) {
    case 2: linear_of_bits<2>(x, tokens, w, y, threads); break;
    case 3: linear_of_bits<3>(x, tokens, w, y, threads); break;
    default: linear_of_bits<4>(x, tokens, w, y, threads); break;
  }
}

}  // namespace

// x [tokens, k] and y [tokens, out_features] of `dtype`.
QCLI_KERNEL(linear_table)(const void* x, int dtype, int64_t tokens, const void* weight, void* y, int threads) {
  QCLI_DISPATCH(dtype, linear, x, tokens, *static_cast<const Weight*>(weight), y, threads, dtype)
}

QCLI_LINEAR_STEP(linear_table_step, linear<float>)
