// Rounding to small floats, to nearest with ties to even.
//
// A float of m bits of mantissa is found by one sum: adding the power of two whose last place is the step of the result rounds to
// it, ties to even. The last bits of the sum then count steps, and the exponent's bits the rest of the code.
#pragma once

#include "functions.h"

namespace {

template <int kBits, int kExponent, int kSignBit>
struct SmallFloat {
  static constexpr int kMantissa = kBits, kLeast = kExponent, kSign = kSignBit;  // kLeast is the exponent of the least normal one
};
using E4M3 = SmallFloat<3, -6, 7>;
using E2M1 = SmallFloat<1, 0, 3>;
constexpr float kE4M3Most = 448, kE2M1Most = 6;

// v, which is a number and clamped, becomes a value of F. Returns its code.
template <class F>
QCLI_INLINE I32x16 round_to(F32x16* v) {
  const I32x16 sign = as_ints(*v) & all(INT32_MIN);
  const F32x16 size = magnitudes(*v), normal = maximum(size, all(from_bits(uint32_t(127 + F::kLeast) << 23)));
  const I32x16 exponent = as_ints(normal) & all(int32_t(kInfinity));
  const I32x16 magic = exponent + all(int32_t((23 - F::kMantissa) << 23));
  const F32x16 sum = size + as_floats(magic);
  *v = as_floats(as_ints(sum - as_floats(magic)) | sign);
  const I32x16 rest = right<23 - F::kMantissa>(exponent) - all(int32_t((127 + F::kLeast) << F::kMantissa));
  return (as_ints(sum) - magic + rest) | right<31 - F::kSign>(sign);
}

}  // namespace
