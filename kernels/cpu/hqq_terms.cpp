// What an iteration of HQQ takes means of. The rules are in qcli/ops/hqq_terms.py.

#include "functions.h"

namespace {

template <class T>
void run(const void* input, int64_t groups, int64_t size, float most, const float* inverses, const float* zeros, float* terms,
         float* magnitudes_of, uint32_t* largest_of, int threads) {
  const T* x = static_cast<const T*>(input);
  parallel(groups, divide_up(1 << 15, size), threads, [=](int64_t first, int64_t last) {
    for (int64_t g = first; g < last; g++) {
      const F32x16 inverse = all(inverses[g]), zero = all(zeros[g]), least = all(0.0f), limit = all(most);
      const F32x16 magic = all(12582912.0f);  // a sum with it rounds to an integer, ties to even
      for (int64_t i = 0, at = g * size; i < size; i += 16, at += 16) {
        const F32x16 w = load_some(x + at, size - i), scaled = w * inverse;
        const F32x16 code = minimum(maximum(scaled + zero, least), limit) + magic - magic;
        store_some(terms + at, code - scaled, size - i);
        store_some(magnitudes_of + at, magnitudes(w - (code - zero) / inverse), size - i);
      }
      largest_of[g] = largest_magnitude(magnitudes_of + g * size, size);
    }
  });
}

}  // namespace

// x [groups, size] of `dtype`; inverses and zeros float32 [groups]; terms and magnitudes float32 [groups, size]; largest float32
// [groups], where a NaN is above all. Codes lie in [0, most].
QCLI_KERNEL(hqq_terms)
(const void* x, int dtype, int64_t groups, int64_t size, float most, const float* inverses, const float* zeros, float* terms,
 float* magnitudes, void* largest, int threads) {
  QCLI_DISPATCH(dtype, run, x, groups, size, most, inverses, zeros, terms, magnitudes, static_cast<uint32_t*>(largest), threads)
}
