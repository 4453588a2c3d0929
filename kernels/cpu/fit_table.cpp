// Tables of rows by k-means. The rules are in qcli/ops/fit_table.py.
//
// Of a row of n elements: a radix sort, 8 bits at a time; running sums, one element after the other; the dynamic program over B bins,
// B^2 / 2 quotients and entries B^2 / 2 sums; and a few rounds of Lloyd's, each a binary search for every entry. A row's arrays stay
// in L2, and those of the program in L1. Lanes are bins, and nothing is added across lanes: every variant gives the same bits.

#include "common.h"

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 8;
#elif defined(__AVX2__)
constexpr int kLanes = 4;
#else
constexpr int kLanes = 2;
#endif
typedef double Doubles __attribute__((vector_size(8 * kLanes)));
typedef int64_t Masks __attribute__((vector_size(8 * kLanes)));

constexpr int kMostEntries = 16, kMostBins = 128;
constexpr int kBlock = 8, kVectors = kBlock / kLanes;          // bins, in which intervals end
constexpr int kStreams = kVectors < 4 ? 4 / kVectors : 1;  // of their begins, so that comparisons need not wait for each other

struct Form {
  int entries, bins, iterations;
  const float* weights;
  const int32_t* left_out;
  int64_t left_out_count;
};

// Unsigned integers in the order of the values. Both zeros are one value.
QCLI_INLINE uint32_t key_of(float value) {
  const uint32_t bits = to_bits(value + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
template <class T>
QCLI_INLINE uint16_t key_of(T value) {
  const uint16_t bits = value.bits == 0x8000 ? uint16_t(0) : value.bits;
  return uint16_t(bits >> 15 ? ~bits : bits | 0x8000);
}
QCLI_INLINE float value_of(const float*, uint32_t key) { return from_bits(key >> 31 ? key & 0x7fffffff : ~key); }
template <class T>
QCLI_INLINE float value_of(const T*, uint16_t key) {
  return to_float(T{uint16_t(key >> 15 ? key & 0x7fff : ~key)});
}
QCLI_INLINE bool finite(float value) { return __builtin_fabsf(value) < from_bits(kInfinity); }
QCLI_INLINE bool finite(bf16 value) { return (value.bits & 0x7fff) < 0x7f80; }
QCLI_INLINE bool finite(f16 value) { return (value.bits & 0x7fff) < 0x7c00; }

template <class T>
struct KeyOf {
  using type = uint16_t;
};
template <>
struct KeyOf<float> {
  using type = uint32_t;
};

// The elements of a row that count, and what is known of them.
template <class T>
struct Row {
  using Key = typename KeyOf<T>::type;
  Key *keys, *other_keys;        // count + 1 each
  float *weights, *other_weights;
  uint8_t* left_out;
  float* values;                 // the different ones, ascending
  double *mass, *moment;         // before each of them, and after the last
  double* running;               // the measure in which bins have even steps
  int64_t count, groups;

  explicit Row(const Scratch& scratch, int64_t columns) {
    char* at = scratch.as<char>();
    const auto next = [&at](int64_t bytes) {
      char* taken = at;
      at += divide_up(bytes, 64) * 64;
      return taken;
    };
    const int64_t size = columns + 1;
    mass = reinterpret_cast<double*>(next(8 * size));
    moment = reinterpret_cast<double*>(next(8 * size));
    running = reinterpret_cast<double*>(next(8 * size));
    values = reinterpret_cast<float*>(next(4 * size));
    weights = reinterpret_cast<float*>(next(4 * size));
    other_weights = reinterpret_cast<float*>(next(4 * size));
    keys = reinterpret_cast<Key*>(next(sizeof(Key) * size));
    other_keys = reinterpret_cast<Key*>(next(sizeof(Key) * size));
    left_out = reinterpret_cast<uint8_t*>(next(size));
  }
  static int64_t bytes(int64_t columns) { return (columns + 1) * (3 * 8 + 3 * 4 + 2 * int64_t(sizeof(Key)) + 1) + 9 * 64; }
};

// Takes the elements that count, and their weights; without `weights` they count alike.
template <bool kWeighted, class T>
QCLI_INLINE void take(Row<T>& row, const T* x, const float* weights, int64_t columns, bool some_left_out) {
  int64_t count = 0;
  for (int64_t i = 0; i < columns; i++) {
    bool counts = finite(x[i]);
    if (some_left_out) counts &= !row.left_out[i];
    if (kWeighted) counts &= weights[i] > 0 && weights[i] < from_bits(kInfinity);
    row.keys[count] = key_of(x[i]);
    if (kWeighted) row.weights[count] = weights[i];
    count += counts;
  }
  row.count = count;
}

template <bool kWeighted, class T>
QCLI_INLINE void sort(Row<T>& row) {
  constexpr int kDigits = sizeof(typename Row<T>::Key);  // two or four: the result is where the elements were
  uint32_t starts[kDigits][256] = {};
  for (int64_t i = 0; i < row.count; i++) {
    for (int d = 0; d < kDigits; d++) starts[d][row.keys[i] >> 8 * d & 255]++;
  }
  auto *from = row.keys, *to = row.other_keys;
  float *from_weights = row.weights, *to_weights = row.other_weights;
  for (int d = 0; d < kDigits; d++) {
    uint32_t start = 0;
    for (uint32_t& each : starts[d]) {
      const uint32_t size = each;
      each = start;
      start += size;
    }
    for (int64_t i = 0; i < row.count; i++) {
      const uint32_t place = starts[d][from[i] >> 8 * d & 255]++;
      to[place] = from[i];
      if (kWeighted) to_weights[place] = from_weights[i];
    }
    auto* swapped = from;
    from = to, to = swapped;
    float* swapped_weights = from_weights;
    from_weights = to_weights, to_weights = swapped_weights;
  }
}

template <bool kWeighted, class T>
QCLI_INLINE void add_up(Row<T>& row) {
  double mass = 0, moment = 0;
  int64_t groups = 0;
  row.mass[0] = row.moment[0] = 0;
  row.keys[row.count] = typename Row<T>::Key(~row.keys[row.count - 1]);
  for (int64_t i = 0; i < row.count; i++) {
    const float value = value_of(static_cast<const T*>(nullptr), row.keys[i]);
    const double weight = kWeighted ? double(row.weights[i]) : 1.0;
    mass += weight;
    moment += weight * double(value);
    row.values[groups] = value;
    row.mass[groups + 1] = mass;
    row.moment[groups + 1] = moment;
    groups += row.keys[i + 1] != row.keys[i];
  }
  row.groups = groups;
}

// For each of kCount values in `wanted`, the number of the n ascending x below it. n is 1 or more.
template <int kCount, class V>
QCLI_INLINE void count_below(const V* x, int64_t n, const V* wanted, int64_t* found) {
  for (int k = 0; k < kCount; k++) found[k] = 0;
  for (int64_t size = n; size > 1;) {
    const int64_t half = size / 2;
    for (int k = 0; k < kCount; k++) found[k] += x[found[k] + half - 1] < wanted[k] ? half : 0;
    size -= half;
  }
  for (int k = 0; k < kCount; k++) found[k] += x[found[k]] < wanted[k];
}

// Where bins begin among the groups, and where the last one ends: [bins + 1].
template <class T>
QCLI_INLINE void find_borders(const Row<T>& row, int bins, int64_t* borders) {
  const int64_t groups = row.groups;
  if (groups <= bins) {
    for (int b = 0; b <= bins; b++) borders[b] = smaller<int64_t>(b, groups);
    return;
  }
  double* running = row.running;
  for (int64_t g = 1; g < groups; g++) {
    running[g] = __builtin_sqrt((double(row.values[g]) - double(row.values[g - 1])) * (row.mass[g + 1] - row.mass[g]));
  }
  running[0] = 0;
  for (int64_t g = 1; g < groups; g++) running[g] += running[g - 1];
  double wanted[16];
  for (int b = 0; b < bins; b += 16) {
    for (int k = 0; k < 16; k++) wanted[k] = running[groups - 1] * (double(b + k) / bins);
    count_below<16>(running, groups, wanted, borders + b);
  }
  borders[bins] = groups;
}


// The best partition of bins into intervals, as numbers of bins: [entries + 1]. mass and moment [bins + 1] are sums before a bin.
// Eight bins, in which an interval may end, are done at a time, for all numbers of intervals: what an interval from bin i to them
// saves is then still in L1.
void best_parts(const double* mass, const double* moment, int bins, int entries, int* parts) {
  alignas(64) double gains[kMostBins + kStreams][kBlock];
  double best[kMostEntries][kMostBins + kStreams] = {};
  uint8_t begins[kMostEntries][kMostBins + 1];
  for (int k = 0; k < entries; k++) begins[k][0] = 0;
  const Doubles zero = {}, lowest = zero - double(from_bits(kInfinity));
  Doubles ends[kVectors], mass_to[kVectors], moment_to[kVectors];
  for (int first = 1; first < bins; first += kBlock) {
    const int stop = first + kBlock;  // begins are below, since an interval may be empty
    for (int v = 0; v < kVectors; v++) {
      for (int lane = 0; lane < kLanes; lane++) ends[v][lane] = first + v * kLanes + lane;
      memcpy(&mass_to[v], mass + first + v * kLanes, sizeof zero);
      memcpy(&moment_to[v], moment + first + v * kLanes, sizeof zero);
    }
    int least = stop;
    for (int k = 1; k < entries; k++) least = smaller<int>(least, begins[k][first - 1]);
    const auto find_gains = [&](int i) {
      for (int v = 0; v < kVectors; v++) {
        const Doubles m = mass_to[v] - mass[i], s = moment_to[v] - moment[i], saved = m > zero ? s * s / m : zero;
        const Doubles gain = ends[v] < zero + double(i) ? lowest : saved;
        memcpy(gains[i] + v * kLanes, &gain, sizeof gain);
      }
    };
    find_gains(0);
    memcpy(&best[0][first], gains[0], sizeof gains[0]);
    for (int i = least; i < stop; i++) find_gains(i);
    for (int i = stop; i < stop + kStreams - 1; i++) {
      for (int v = 0; v < kVectors; v++) memcpy(gains[i] + v * kLanes, &lowest, sizeof lowest);
    }
    for (int k = 1; k < entries; k++) {
      Doubles most[kStreams][kVectors], begin[kStreams][kVectors];
      for (int t = 0; t < kStreams; t++) {
        for (int v = 0; v < kVectors; v++) most[t][v] = lowest, begin[t][v] = zero;
      }
      for (int i = begins[k][first - 1]; i < stop; i += kStreams) {
#pragma GCC unroll 4
        for (int t = 0; t < kStreams; t++) {
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; v++) {
            Doubles here;
            memcpy(&here, gains[i + t] + v * kLanes, sizeof here);
            here += best[k - 1][i + t];
            begin[t][v] = here > most[t][v] ? zero + double(i + t) : begin[t][v];
            most[t][v] = here > most[t][v] ? here : most[t][v];
          }
        }
      }
      for (int v = 0; v < kVectors; v++) {
        for (int t = 1; t < kStreams; t++) {
          const Masks better = (most[t][v] > most[0][v]) | ((most[t][v] == most[0][v]) & (begin[t][v] < begin[0][v]));
          most[0][v] = better ? most[t][v] : most[0][v];
          begin[0][v] = better ? begin[t][v] : begin[0][v];
        }
        memcpy(&best[k][first + v * kLanes], &most[0][v], sizeof zero);
        for (int lane = 0; lane < kLanes; lane++) begins[k][first + v * kLanes + lane] = uint8_t(begin[0][v][lane]);
      }
    }
  }
  parts[0] = 0;
  parts[entries] = bins;
  for (int k = entries - 1; k > 0; k--) parts[k] = begins[k][parts[k + 1]];
}

// The means of the groups from one end to the next, until no group changes its entry. ends [entries + 1]; entries beyond
// `form.entries` are infinite.
template <class T>
QCLI_INLINE void lloyd(const Row<T>& row, const Form& form, int64_t* ends, double* entries) {
  for (int k = 0; k < form.entries; k++) entries[k] = double(row.values[smaller(ends[k], row.groups - 1)]);
  float middles[kMostEntries];
  int64_t found[kMostEntries];
  for (int k = 0; k < kMostEntries; k++) middles[k] = from_bits(kInfinity);
  for (int n = 0; n < form.iterations; n++) {
    for (int k = 0; k < form.entries; k++) {
      const double mass = row.mass[ends[k + 1]] - row.mass[ends[k]], moment = row.moment[ends[k + 1]] - row.moment[ends[k]];
      entries[k] = mass > 0 ? moment / mass : entries[k];
    }
    for (int k = 1; k < form.entries; k++) {
      for (int j = k; j > 0 && entries[j] < entries[j - 1]; j--) {
        const double lower = entries[j];
        entries[j] = entries[j - 1];
        entries[j - 1] = lower;
      }
    }
    for (int k = 0; k + 1 < form.entries; k++) middles[k] = float((entries[k + 1] + entries[k]) / 2);
    count_below<kMostEntries>(row.values, row.groups, middles, found);
    bool changed = false;
    for (int k = 0; k + 1 < form.entries; k++) {
      changed |= found[k] != ends[k + 1];
      ends[k + 1] = found[k];
    }
    if (!changed) break;
  }
}

template <class T>
QCLI_INLINE void fit_row(Row<T>& row, const T* x, const float* weights, int64_t columns, const int32_t* left_out, const Form& form,
                         float* table) {
  if (left_out) {
    memset(row.left_out, 0, columns);
    for (int64_t i = 0; i < form.left_out_count; i++) row.left_out[left_out[i]] = 1;
  }
  row.count = 0;
  if (weights) {
    take<true>(row, x, weights, columns, left_out);
    sort<true>(row);
    if (row.count) add_up<true>(row);
  }
  if (!row.count) {
    take<false>(row, x, weights, columns, left_out);
    sort<false>(row);
    if (row.count) add_up<false>(row);
  }
  if (!row.count) {
    for (int k = 0; k < form.entries; k++) table[k] = 0;
    return;
  }
  int64_t borders[kMostBins + 1], ends[kMostEntries + 1];
  double mass[kMostBins + 1], moment[kMostBins + 1], entries[kMostEntries];
  int parts[kMostEntries + 1];
  find_borders(row, form.bins, borders);
  for (int b = 0; b <= form.bins; b++) {
    mass[b] = row.mass[borders[b]];
    moment[b] = row.moment[borders[b]];
  }
  best_parts(mass, moment, form.bins, form.entries, parts);
  for (int k = 0; k <= form.entries; k++) ends[k] = borders[parts[k]];
  lloyd(row, form, ends, entries);
  for (int k = 0; k < form.entries; k++) table[k] = float(entries[k]);
}

template <class T>
void fit(const void* input, int64_t rows, int64_t columns, const Form& form, float* table, int threads) {
  const T* x = static_cast<const T*>(input);
  parallel(rows, divide_up(1 << 13, larger<int64_t>(columns, 1)), threads, [=, &form](int64_t first, int64_t last) {
    const Scratch scratch(Row<T>::bytes(columns));
    Row<T> row(scratch, columns);
    for (int64_t r = first; r < last; r++) {
      const float* weights = form.weights ? form.weights + r * columns : nullptr;
      const int32_t* left_out = form.left_out_count ? form.left_out + r * form.left_out_count : nullptr;
      fit_row(row, x + r * columns, weights, columns, left_out, form, table + r * form.entries);
    }
  });
}

}  // namespace

// x [rows, columns] of `dtype`; tables float32 [rows, 2^bits]. bins, a multiple of 16, is 128 at most. weights float32
// [rows, columns], or null; left_out int32 [rows, left_out_count] are columns.
QCLI_KERNEL(fit_table)
(const void* x, int dtype, int64_t rows, int64_t columns, int bits, int bins, int iterations, const float* weights,
 const int32_t* left_out, int64_t left_out_count, float* table, int threads) {
  const Form form = {1 << bits, bins, iterations, weights, left_out, left_out_count};
  QCLI_DISPATCH(dtype, fit, x, rows, columns, form, table, threads)
}
