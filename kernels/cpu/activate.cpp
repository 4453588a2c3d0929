// The activation between two products: y = act(gate) * up, or act(gate) without up.
//
// gate, up and y have row strides, so that one product may give gate and up side by side. A thread takes some columns of a token; a
// few thousand are left to the calling thread. Bytes moved: 4 per value and tensor.

#include "functions.h"

namespace {

enum Kind : int { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3, kRelu2 = 4, kQuickGelu = 5 };

struct Activate {
  const float* gate;  // [tokens, n]
  const float* up;    // [tokens, n], or null
  float* y;           // [tokens, n]; may be gate or up
  int64_t gate_stride, up_stride, y_stride, n;
  int kind;
};

constexpr int64_t kGrain = 4096;  // values

template <int kKind>
QCLI_INLINE F32x16 activation(F32x16 x) {
  if constexpr (kKind == kSilu) return x * sigmoid(x);
  if constexpr (kKind == kGelu) {
    return all(0.5f) * x * (all(1.0f) + error_function(x * all(0.70710678f)));
  }
  if constexpr (kKind == kGeluTanh) {  // (1 + tanh(u)) / 2 = sigmoid(2 u)
    return x * sigmoid(x * (all(1.59576912f) + all(0.0713548163f) * (x * x)));
  }
  if constexpr (kKind == kRelu) return maximum(all(0.0f), x);
  if constexpr (kKind == kRelu2) {
    const F32x16 positive = maximum(all(0.0f), x);
    return positive * positive;
  }
  return x * sigmoid(all(1.702f) * x);
}

template <int kKind>
void activate_some(const float* gate, const float* up, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const int64_t count = smaller(int64_t(16), n - i);
    F32x16 value = activation<kKind>(load_some(gate + i, count));
    if (up) value = value * load_some(up + i, count);
    store_some(y + i, value, count);
  }
}

template <int kKind>
void activate(const Activate& a, int64_t tokens, int threads) {
  const int64_t pieces = divide_up(a.n, kGrain);
  const int64_t width = divide_up(divide_up(a.n, larger(pieces, int64_t(1))), 16) * 16;
  // Small tokens share a piece.
  const int64_t grain = pieces > 1 ? 1 : larger(int64_t(1), kGrain / larger(a.n, int64_t(1)));
  parallel(tokens * pieces, grain, threads, [&a, pieces, width](int64_t first, int64_t last) {
    for (int64_t piece = first; piece < last; piece++) {
      const int64_t token = piece / pieces, from = piece % pieces * width, count = smaller(width, a.n - from);
      activate_some<kKind>(a.gate + token * a.gate_stride + from, a.up ? a.up + token * a.up_stride + from : nullptr,
                           a.y + token * a.y_stride + from, count);
    }
  });
}

}  // namespace

QCLI_STEP(activate) {
  (void)start;
  const Activate& a = *static_cast<const Activate*>(record);
  switch (a.kind) {
    case kSilu: activate<kSilu>(a, tokens, threads); break;
    case kGelu: activate<kGelu>(a, tokens, threads); break;
    case kGeluTanh: activate<kGeluTanh>(a, tokens, threads); break;
    case kRelu: activate<kRelu>(a, tokens, threads); break;
    case kRelu2: activate<kRelu2>(a, tokens, threads); break;
    case kQuickGelu: activate<kQuickGelu>(a, tokens, threads); break;
  }
}
