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

#include "table_products.h"

namespace {

constexpr int kPieces = 2;  // pieces of rows per thread; few, because each begins with streams that are not prefetched

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
  const int64_t read = read_columns(w.k) / kUnit * unit_bytes(kBits);
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
          set_table<kBits>(&row, &given.x);
        }
        // The load of the last codes must stay within the weight.
        if (n * row_bytes + read > bytes) {
          row.packed = static_cast<uint8_t*>(memcpy(copies.as<uint8_t>() + count * read, row.packed, row_bytes));
        }
      }
      for (int64_t t = 0; t < tokens;) {
        const int some = int(tokens - t >= kTokens ? kTokens : tokens - t >= 2 ? 2 : 1);
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
  const int64_t halves_of_units = read_columns(w.k) / 32;
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
    const typename IntsOf<kBits>::Type laid_out(x, tokens, w.k);
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
  if (w.sparse) add_product(static_cast<T*>(output), x, tokens, *w.sparse, threads);
}

}  // namespace

// x [tokens, k] and y [tokens, out_features] of `dtype`.
QCLI_KERNEL(linear_table)(const void* x, int dtype, int64_t tokens, const void* weight, void* y, int threads) {
  QCLI_DISPATCH(dtype, linear, x, tokens, *static_cast<const Weight*>(weight), y, threads, dtype)
}

QCLI_LINEAR_STEP(linear_table_step, linear<float>)
