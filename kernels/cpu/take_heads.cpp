// Copies the heads of queries, keys or values out of a product in which they alternate: y[t, h] = x[t, h, offset : offset + n].

#include "common.h"

namespace {

struct TakeHeads {
  const float* x;  // [tokens, heads, stride]
  float* y;        // [tokens, heads, n]
  int64_t heads, stride, offset, n;
};

}  // namespace

QCLI_STEP(take_heads) {
  (void)start, (void)threads;
  const TakeHeads& a = *static_cast<const TakeHeads*>(record);
  for (int64_t i = 0; i < tokens * a.heads; i++) memcpy(a.y + i * a.n, a.x + i * a.stride + a.offset, 4 * a.n);
}
