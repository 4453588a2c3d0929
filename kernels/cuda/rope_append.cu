// Rotates q and k to their positions, and appends k and v to the cache.
//
//   y = x cos + rotated(x) sin      with cos and sin of the token's position, for the first rot_dim values of a head
//   rotated(x)[i] = -x[i + rot_dim / 2] in the first half, x[i - rot_dim / 2] in the second         interleaved = 0
//   rotated(x)[2 i] = -x[2 i + 1], rotated(x)[2 i + 1] = x[2 i]                                     interleaved = 1
//
//   start       int64, the position of the first token, in device memory: a captured graph reads it at each replay
//   q           DTYPE [tokens, heads, head_dim], rotated in place
//   k, v        DTYPE [tokens, kv_heads, head_dim] and [tokens, kv_heads, v_dim]; q, k and v have strides between tokens
//   cos, sin    float32 [positions, rot_dim], or null: nothing is rotated
//   keys        STORED [kv_heads, capacity, head_dim], values STORED [kv_heads, capacity, v_dim]; position p: slot p % capacity
//   key_scales  float32 [kv_heads, capacity], value_scales the same, with STORED = int8_t alone
//
// A warp takes a row: a head of q, of k or of v of a token. Grid: (heads + 2 kv_heads, tokens). A row is rotated into shared memory
// and leaves from there: to q, or to the cache, rounded to nearest, or for int8 as round(row / scale) with scale = absmax / 127. A
// row with NaN or infinity has zeros, and NaN or infinity as its scale. No product is fused: the reference has the same bits. A
// position beyond the tables is left out. Bytes moved: 4 per 16-bit value.
// prebuilt: DTYPE={float,__half,__nv_bfloat16} STORED={float,__half,__nv_bfloat16,int8_t}
#include "common.cuh"

using Scalar = DTYPE;
using Stored = STORED;
constexpr int THREADS = 32;

// A row from shared memory to the cache.
template <class T>
__device__ inline void store_row(const float* row, int count, T* to, float*) {
  for (int i = threadIdx.x; i < count; i += THREADS) to[i] = from_float<T>(row[i]);
}
__device__ inline void store_row(const float* row, int count, int8_t* to, float* scale) {
  uint32_t largest = 0;
  for (int i = threadIdx.x; i < count; i += THREADS) largest = max(largest, magnitude(row[i]));
  const float step = __fdiv_rn(__uint_as_float(group_max(largest, 32)), 127.0f);
  const bool usable = step > 0.0f && step < INFINITY;
  if (threadIdx.x == 0) *scale = step;
  for (int i = threadIdx.x; i < count; i += THREADS) {
    const int code = usable ? __float2int_rn(__fdiv_rn(row[i], step)) : 0;
    to[i] = int8_t(min(127, max(-127, code)));  // a subnormal step is not exact
  }
}

KERNEL void __launch_bounds__(THREADS)
    rope_append(const long long* __restrict__ start, Scalar* q, long long q_stride, const Scalar* __restrict__ k,
                long long k_stride, const Scalar* __restrict__ v, long long v_stride, const float* __restrict__ cos,
                const float* __restrict__ sin, long long positions, int rot_dim, int interleaved, int heads, int kv_heads,
                int head_dim, int v_dim, long long capacity, Stored* __restrict__ keys, Stored* __restrict__ values,
                float* __restrict__ key_scales, float* __restrict__ value_scales) {
  DYNAMIC_SHARED(float, row);
  const int token = blockIdx.y, item = blockIdx.x, kind = item < heads ? 0 : item < heads + kv_heads ? 1 : 2;
  const int head = kind == 0 ? item : kind == 1 ? item - heads : item - heads - kv_heads;
  const long long position = *start + token;
  if (position < 0 || (cos && position >= positions)) return;
  const int count = kind == 2 ? v_dim : head_dim, turned = kind == 2 || !cos ? 0 : rot_dim, half = rot_dim / 2;
  const Scalar* from = kind == 0   ? q + token * q_stride + (long long)head * head_dim
                       : kind == 1 ? k + token * k_stride + (long long)head * head_dim
                                   : v + token * v_stride + (long long)head * v_dim;
  const long long table = position * rot_dim;
  for (int i = threadIdx.x; i < count; i += THREADS) {
    float value = to_float(from[i]);
    if (i < turned) {
      const bool first = interleaved ? i % 2 == 0 : i < half;
      const int other = interleaved ? i ^ 1 : first ? i + half : i - half;
      const float partner = to_float(from[other]);
      value = __fadd_rn(__fmul_rn(value, cos[table + i]), __fmul_rn(first ? -partner : partner, sin[table + i]));
    }
    row[i] = value;
  }
  __syncwarp();  // q is overwritten only now
  if (kind == 0) {
    Scalar* to = q + token * q_stride + (long long)head * head_dim;
    for (int i = threadIdx.x; i < turned; i += THREADS) to[i] = from_float<Scalar>(row[i]);
    return;
  }
  const long long slot = head * capacity + position % capacity;
  if (kind == 1) {
    store_row(row, count, keys + slot * head_dim, key_scales ? key_scales + slot : nullptr);
  } else {
    store_row(row, count, values + slot * v_dim, value_scales ? value_scales + slot : nullptr);
  }
}
