// Attention of a few tokens to the cache, which already holds their keys and values.
//
//   s[p] = scale * q . k[p]                         then softcap * tanh(s / softcap), if softcap is not 0
//   y    = sum_p exp(s[p]) v[p]  /  (sum_p exp(s[p]) + exp(sink))          p from max(0, position - window + 1) to position
//
//   start       int64, the position of the first token, in device memory: a captured graph reads it at each replay
//   q, y        [tokens, heads, head_dim] and [tokens, heads, v_dim] of the dtypes q_type and y_type; q_stride between tokens of q
//   keys        STORED [kv_heads, capacity, head_dim], values STORED [kv_heads, capacity, v_dim]; position p: slot p % capacity
//   key_scales  float32 [kv_heads, capacity], value_scales the same, with STORED = int8_t alone
//   sinks       float32 [heads], or null
//   totals      float32 [parts, tokens, heads, 2]: the largest score of a part, and the sum of exp(score - largest)
//   partial     float32 [parts, tokens, heads, v_dim]: the sum of exp(score - largest) v
//   QUERIES     1 or 4, the queries that a block takes
//   ALIGNED     0 if head_dim or v_dim is no multiple of 8, or an address is no multiple of 16; else 1, the default
//
// attend: a block takes a part of the positions of one key-value head (grid: parts, kv_heads, queries / QUERIES). The queries are
// those of all tokens and of the query heads that share the key-value head. The other blocks of a part find it in L2. `lanes` lanes
// take a row, eight values each. They read TURN rows of keys and of values at a time, and follow the maximum from turn to turn
// ("online softmax", Milakov and Gimelshein). At the end the groups of lanes of a block merge through shared memory.
// merge_attention: a block merges the parts of one query, in their order (flash-decoding). The grid does not depend on `start`, so
// a part may have no positions. Its total is 0, and it is passed over.
// All arithmetic is float32. Bytes moved: those of the keys and values attended to.
// prebuilt: STORED={float,__half,__nv_bfloat16,int8_t} QUERIES={1,4}
#include "functions.cuh"

#ifndef ALIGNED
#define ALIGNED 1
#endif

using Stored = STORED;
constexpr int THREADS = 128;
constexpr int TURN = 4;          // rows of a group of lanes at a time
constexpr int MOST_GROUPS = 16;  // of a block: a group has eight lanes or more
constexpr int CHUNK = 8;

__device__ inline void load8(const int8_t* from, float (&to)[CHUNK]) {
  const uint2 bits = __ldcs(reinterpret_cast<const uint2*>(from));
#pragma unroll
  for (int i = 0; i < CHUNK; ++i) to[i] = float(int8_t((i < 4 ? bits.x : bits.y) >> 8 * (i % 4)));
}
__device__ inline float widened(int8_t x) { return x; }
template <class T>
__device__ inline float widened(T x) {
  return to_float(x);
}

// Eight values of a row from `at` on, with zeros beyond `count`.
__device__ inline void load_chunk(const Stored* row, int at, int count, float (&to)[CHUNK]) {
#pragma unroll
  for (int i = 0; i < CHUNK; ++i) to[i] = 0.0f;
  if constexpr (ALIGNED) {
    if (at < count) load8(row + at, to);
  } else {
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
      if (at + i < count) to[i] = widened(row[at + i]);
    }
  }
}

// What is subtracted from scores. If all are -infinity they stay so, and their weights are 0.
__device__ inline float origin(float most) { return most == -INFINITY ? 0.0f : most; }

KERNEL void __launch_bounds__(THREADS)
    attend(const long long* __restrict__ start, int tokens, int heads, int kv_heads, int head_dim, int v_dim,
           const void* __restrict__ q, int q_type, long long q_stride, const Stored* __restrict__ keys,
           const Stored* __restrict__ values, const float* __restrict__ key_scales, const float* __restrict__ value_scales,
           int capacity, int lanes, float scale, float softcap, int window, float* __restrict__ totals,
           float* __restrict__ partial) {
  __shared__ float of_groups[QUERIES][MOST_GROUPS][2];
  __shared__ float sums[QUERIES][THREADS * CHUNK];
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = THREADS / lanes, at = CHUNK * lane;
  const int kv_head = blockIdx.y, sharing = heads / kv_heads, first = blockIdx.z * QUERIES, last = tokens * sharing;

  // The positions of this part. The oldest that the cache can hold bounds them, whatever `start` says.
  const long long from = *start, end = from + tokens;
  long long begin = window > 0 && from - window + 1 > 0 ? from - window + 1 : 0;
  begin = max(begin, end - capacity);
  const int count = int(max(end - begin, 0LL)), rows = groups * TURN, turns = (count + rows - 1) / rows;
  const int of_part = (turns + gridDim.x - 1) / gridDim.x * rows;
  const int offset = blockIdx.x * of_part, stop = min(count, offset + of_part);
  const int slot = int(begin % capacity);

  float query[QUERIES][CHUNK], total[QUERIES], most[QUERIES], sum[QUERIES][CHUNK];
  int oldest[QUERIES], newest[QUERIES];  // the positions that a query attends to, from `begin` on
#pragma unroll
  for (int s = 0; s < QUERIES; ++s) {
    const int i = min(first + s, last - 1), token = i / sharing, head = kv_head * sharing + i % sharing;
    const long long place = token * q_stride + (long long)head * head_dim, position = from + token;
    newest[s] = int(position - begin);
    oldest[s] = window > 0 ? int(max(position - window + 1 - begin, 0LL)) : 0;
#pragma unroll
    for (int c = 0; c < CHUNK; ++c) {
      query[s][c] = at + c < head_dim ? load_as(q, q_type, place + at + c) : 0.0f;
      sum[s][c] = 0.0f;
    }
    total[s] = 0.0f;
    most[s] = -INFINITY;
  }

  // All groups of a warp take the same number of turns, because they exchange values.
  for (int turn = offset; turn < stop; turn += rows) {
    float key[TURN][CHUNK], value[TURN][CHUNK], key_scale[TURN], value_scale[TURN], score[QUERIES][TURN];
    const int mine = turn + group * TURN;
#pragma unroll
    for (int r = 0; r < TURN; ++r) {
      const int within = min(mine + r, stop - 1), place = slot + within;
      const long long row = (long long)kv_head * capacity + (place >= capacity ? place - capacity : place);
      load_chunk(keys + row * head_dim, at, head_dim, key[r]);
      load_chunk(values + row * v_dim, at, v_dim, value[r]);
      key_scale[r] = key_scales ? key_scales[row] : 1.0f;
      value_scale[r] = value_scales ? value_scales[row] : 1.0f;
    }
#pragma unroll
    for (int s = 0; s < QUERIES; ++s) {
#pragma unroll
      for (int r = 0; r < TURN; ++r) {
        float product = 0.0f;
#pragma unroll
        for (int c = 0; c < CHUNK; ++c) product += query[s][c] * key[r][c];
        score[s][r] = product;
      }
    }
    for (int other = lanes / 2; other > 0; other /= 2) {
#pragma unroll
      for (int s = 0; s < QUERIES; ++s) {
#pragma unroll
        for (int r = 0; r < TURN; ++r) score[s][r] += __shfl_xor_sync(WHOLE_WARP, score[s][r], other);
      }
    }
#pragma unroll
    for (int s = 0; s < QUERIES; ++s) {
      float largest = most[s];
#pragma unroll
      for (int r = 0; r < TURN; ++r) {
        float found = score[s][r] * scale * key_scale[r];
        if (softcap != 0.0f) found = softcap * hyperbolic_tangent(__fdiv_rn(found, softcap));
        const int position = mine + r;
        score[s][r] = position < stop && position >= oldest[s] && position <= newest[s] ? found : -INFINITY;
        largest = score[s][r] > largest ? score[s][r] : largest;  // NaN counts as the least
      }
      const float factor = exp_negative(most[s] - origin(largest));
      most[s] = largest;
      total[s] *= factor;
#pragma unroll
      for (int c = 0; c < CHUNK; ++c) sum[s][c] *= factor;
#pragma unroll
      for (int r = 0; r < TURN; ++r) {
        const float weight = exp_negative(score[s][r] - origin(largest)), scaled = weight * value_scale[r];
        total[s] += weight;
#pragma unroll
        for (int c = 0; c < CHUNK; ++c) sum[s][c] += scaled * value[r][c];
      }
    }
  }

#pragma unroll
  for (int s = 0; s < QUERIES; ++s) {
    if (lane == 0) {
      of_groups[s][group][0] = most[s];
      of_groups[s][group][1] = total[s];
    }
#pragma unroll
    for (int c = 0; c < CHUNK; ++c) sums[s][(group * lanes + lane) * CHUNK + c] = sum[s][c];
  }
  __syncthreads();
  for (int s = 0; s < QUERIES && first + s < last; ++s) {
    const int i = first + s, head = kv_head * sharing + i % sharing;
    const long long place = ((long long)blockIdx.x * tokens + i / sharing) * heads + head;
    float largest = -INFINITY, all = 0.0f;
    for (int g = 0; g < groups; ++g) largest = fmaxf(largest, of_groups[s][g][0]);
    for (int g = 0; g < groups; ++g) all += exp_negative(of_groups[s][g][0] - origin(largest)) * of_groups[s][g][1];
    if (threadIdx.x == 0) {
      totals[2 * place] = largest;
      totals[2 * place + 1] = all;
    }
    for (int d = threadIdx.x; d < v_dim; d += THREADS) {
      float merged = 0.0f;
      for (int g = 0; g < groups; ++g) {
        merged += exp_negative(of_groups[s][g][0] - origin(largest)) * sums[s][g * lanes * CHUNK + d];
      }
      partial[place * v_dim + d] = merged;
    }
  }
}

KERNEL void __launch_bounds__(THREADS)
    merge_attention(const float* __restrict__ totals, const float* __restrict__ partial, int parts, int heads, int v_dim,
                    const float* __restrict__ sinks, int y_type, void* __restrict__ y) {
  const int i = blockIdx.x, count = gridDim.x;
  const float sink = sinks ? sinks[i % heads] : -INFINITY;
  float most = sink;
  for (int p = 0; p < parts; ++p) most = fmaxf(most, totals[2 * ((long long)p * count + i)]);
  float total = exp_negative(sink - origin(most));
  for (int p = 0; p < parts; ++p) {
    const float* of_part = totals + 2 * ((long long)p * count + i);
    total += exp_negative(of_part[0] - origin(most)) * of_part[1];
  }
  const float share = __fdiv_rn(1.0f, total);
  for (int d = threadIdx.x; d < v_dim; d += THREADS) {
    float sum = 0.0f;
    for (int p = 0; p < parts; ++p) {
      const long long place = (long long)p * count + i;
      if (totals[2 * place + 1] == 0.0f) continue;
      sum += exp_negative(totals[2 * place] - origin(most)) * partial[place * v_dim + d];
    }
    store_as(y, y_type, (long long)i * v_dim + d, sum * share);
  }
}
