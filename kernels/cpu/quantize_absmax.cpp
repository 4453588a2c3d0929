// Double quantization of absmax, and its mean; the rules are in qcli/ops/quantize_absmax.py.

#include "simd.h"

namespace {

constexpr int64_t kGroup = 256;

// The children of node i are 2 i and 2 i + 1; node 1 is the middle threshold.
struct Search256 {
  float tree[256];
};
Search256 search256(const float* ascending) {
  Search256 search = {};
  for (int node = 1; node < 256; node++) {
    int depth = 0;
    while (node >> (depth + 1)) depth++;
    search.tree[node] = ascending[((2 * (node - (1 << depth)) + 1) << (7 - depth)) - 1];
  }
  return search;
}

void quantize_group(const float* absmax, int64_t length, float offset, const Search256& search, uint8_t* codes,
                    float* nested_absmax) {
  alignas(64) float y[kGroup] = {};
  for (int64_t i = 0; i < length; i++) y[i] = absmax[i] - offset;
  const float largest = *nested_absmax = absmax_of(y, kGroup);
  if (largest == 0) {
    // All y are zero. They stay zero instead of becoming 0 / 0.
  } else if (largest < 1e-38f) {
    for (int64_t i = 0; i < kGroup; i++) y[i] = y[i] / largest;
  } else {
    const float factor = 1.0f / largest;
    for (int64_t i = 0; i < kGroup; i++) y[i] = y[i] * factor;
  }
  alignas(64) uint8_t ranks[kGroup];
  for (int64_t i = 0; i < kGroup; i += 16) {
    const F32x16 v = load(y + i);
    I32x16 node = all(int32_t(1));
    for (int level = 0; level < 8; level++) node = plus_greater(node + node, v, gather(search.tree, node));
    store_bytes(ranks + i, node + all(int32_t(-256)));
  }
  for (int64_t i = 0; i < length; i++) {
    // A NaN is above every threshold, as in torch.bucketize.
    codes[i] = y[i] != y[i] ? uint8_t(255) : ranks[i];
  }
}

}  // namespace

// absmax float32 [count]; thresholds float32 [255]; codes uint8 [count]; nested_absmax float32 [ceil(count / 256)].
QCLI_KERNEL(quantize_absmax)
(const float* absmax, int64_t count, float offset, const float* thresholds, uint8_t* codes, float* nested_absmax,
 int threads) {
  const Search256 search = search256(thresholds);
  parallel(divide_up(count, kGroup), 32, threads, [=, &search](int64_t first, int64_t last) {
    for (int64_t g = first; g < last; g++) {
      const int64_t start = g * kGroup;
      quantize_group(absmax + start, smaller(kGroup, count - start), offset, search, codes + start, nested_absmax + g);
    }
  });
}

// Writes the sum of the finite values, by folding, to `sum` float64 [1], and their number to `finite` int64 [1]. `folded` float64
// [half] is scratch; `half` is half of the least power of two that is not below `count`, and at least 1.
QCLI_KERNEL(fold_absmax)
(const float* absmax, int64_t count, int64_t half, double* folded, double* sum, int64_t* finite, int) {
  int64_t kept = 0;
  for (int64_t i = 0; i < half; i++) {
    const bool good = i < count && __builtin_isfinite(absmax[i]);
    folded[i] = good ? double(absmax[i]) : 0.0;
    kept += good;
  }
  for (int64_t i = half; i < count; i++) {
    const bool good = __builtin_isfinite(absmax[i]);
    folded[i - half] += good ? double(absmax[i]) : 0.0;
    kept += good;
  }
  for (half /= 2; half; half /= 2) {
    for (int64_t i = 0; i < half; i++) folded[i] += folded[i + half];
  }
  *sum = folded[0];
  *finite = kept;
}
