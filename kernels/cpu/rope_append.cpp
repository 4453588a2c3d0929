// Rotates q and k to their positions, and appends k and v to the cache.
//
//   y = x cos + rotated(x) sin      with cos and sin of the token's position, for the first rot_dim values of a head
//   rotated(x)[i] = -x[i + rot_dim / 2] in the first half, x[i - rot_dim / 2] in the second         interleaved = 0
//   rotated(x)[2 i] = -x[2 i + 1], rotated(x)[2 i + 1] = x[2 i]                                     interleaved = 1
//
// q is rotated in place. k and v are read once and written to the cache, in its dtype: rounded to nearest, or for int8 as
// round(row / scale) with scale = absmax / 127. A row with NaN or infinity has zeros, and NaN or infinity as its scale.
//
// A thread takes whole heads of a token; a few heads are left to the calling thread.

#include "cache.h"

namespace {

struct RopeAppend {
  float* q;          // [tokens, heads, head_dim], with q_stride floats between tokens
  const float* k;    // [tokens, kv_heads, head_dim]
  const float* v;    // [tokens, kv_heads, v_dim]
  const float* cos;  // [positions, rot_dim], or null: nothing is rotated
  const float* sin;
  Cache cache;
  int64_t q_stride, k_stride, v_stride, heads, rot_dim, interleaved;
};

constexpr int64_t kGrain = 32768;  // values

// to and x may be the same. `turned` has room for rot_dim values. The products are written in lanes: of alternating differences and
// sums GCC makes fused instructions, in spite of -ffp-contract=off.
void rotate(const float* x, const float* cos, const float* sin, int64_t rot_dim, bool interleaved, float* turned, float* to) {
  const int64_t half = rot_dim / 2;
  if (interleaved) {
    for (int64_t i = 0; i < rot_dim; i += 2) {
      turned[i] = -x[i + 1];
      turned[i + 1] = x[i];
    }
  } else {
    for (int64_t i = 0; i < half; i++) turned[i] = -x[half + i];
    memcpy(turned + half, x, 4 * half);
  }
  for (int64_t i = 0; i < rot_dim; i += 16) {
    const int64_t count = smaller(int64_t(16), rot_dim - i);
    const F32x16 kept = load_some(x + i, count) * load_some(cos + i, count);
    store_some(to + i, kept + load_some(turned + i, count) * load_some(sin + i, count), count);
  }
}

template <class T>
void store_row(const float* x, int64_t count, T* to, float*) {
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t some = smaller(int64_t(16), count - i);
    store_some(to + i, load_some(x + i, some), some);
  }
}
void store_row(const float* x, int64_t count, int8_t* to, float* scale) {
  *scale = absmax_of(x, count) / 127.0f;
  if (!(*scale > 0 && *scale < from_bits(kInfinity))) {
    memset(to, 0, count);
    return;
  }
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t some = smaller(int64_t(16), count - i);
    const F32x16 value = load_some(x + i, some) / all(*scale);
    int8_t bytes[16];
    store_bytes(bytes, rounded(maximum(all(-127.0f), minimum(all(127.0f), value))));  // a subnormal scale is not exact
    memcpy(to + i, bytes, some);
  }
}

template <class T>
void rope_append(const RopeAppend& a, int64_t tokens, int64_t start, int threads) {
  const Cache& cache = a.cache;
  const int64_t of_token = a.heads + cache.kv_heads;
  parallel(tokens * of_token, larger(int64_t(1), kGrain / cache.head_dim), threads, [=, &a, &cache](int64_t first, int64_t last) {
    const Scratch scratch(8 * cache.head_dim);
    float *rotated = scratch.as<float>(), *turned = rotated + cache.head_dim;
    for (int64_t item = first; item < last; item++) {
      const int64_t token = item / of_token, head = item % of_token - a.heads, position = start + token;
      const float* cos = a.cos ? a.cos + position * a.rot_dim : nullptr;
      const float* sin = a.cos ? a.sin + position * a.rot_dim : nullptr;
      if (head < 0) {
        float* q = a.q + token * a.q_stride + (head + a.heads) * cache.head_dim;
        if (cos) rotate(q, cos, sin, a.rot_dim, a.interleaved, turned, q);
        continue;
      }
      const float *k = a.k + token * a.k_stride + head * cache.head_dim, *v = a.v + token * a.v_stride + head * cache.v_dim;
      if (cos) {
        memcpy(rotated, k, 4 * cache.head_dim);
        rotate(k, cos, sin, a.rot_dim, a.interleaved, turned, rotated);
        k = rotated;
      }
      const int64_t row = head * cache.capacity + position % cache.capacity;
      const bool scaled = cache.dtype == kInt8;
      store_row(k, cache.head_dim, static_cast<T*>(cache.keys) + row * cache.head_dim, scaled ? cache.key_scales + row : nullptr);
      store_row(v, cache.v_dim, static_cast<T*>(cache.values) + row * cache.v_dim, scaled ? cache.value_scales + row : nullptr);
    }
  });
}

}  // namespace

QCLI_STEP(rope_append) {
  const RopeAppend& a = *static_cast<const RopeAppend*>(record);
  QCLI_CACHE_DISPATCH(int(a.cache.dtype), rope_append, a, tokens, start, threads)
}
