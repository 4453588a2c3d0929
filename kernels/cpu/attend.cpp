// Attention of a few tokens to the cache, which already holds their keys and values.
//
//   s[p] = scale * q . k[p]                         then softcap * tanh(s / softcap), if softcap is not 0
//   y    = sum_p exp(s[p]) v[p]  /  (sum_p exp(s[p]) + exp(sink))          p from max(0, position - window + 1) to position
//
// The positions are divided into pieces, and a thread takes a piece of one key-value head for all tokens and all query heads that
// share it. A piece goes by blocks of 64 positions: up to four queries at a time read the block's keys and then its values, which
// the cache keeps for the next four, so memory is read once. The maximum, the sum and y follow from block to block ("online
// softmax", Milakov and Gimelshein). At the end the pieces of a query are merged in their order (flash-decoding). Pieces depend on
// the number of positions alone: results have the same bits for any number of threads.
//
// Bytes moved: those of the keys and values attended to. A short context is one piece, and is left to the calling thread.

#include "cache.h"

namespace {

struct Attend {
  const float* q;      // [tokens, heads, head_dim], with q_stride floats between tokens
  const float* sinks;  // [heads], or null
  float* y;            // [tokens, heads, v_dim], with y_stride floats between tokens; not q
  Cache cache;
  int64_t q_stride, y_stride, heads, window;  // window 0: all positions
  float scale, softcap;
};

constexpr int kQueries = 4;
constexpr int64_t kBlock = 64, kPiece = 256, kMostPieces = 64;
#if defined(__AVX2__)
constexpr int kOfOne = 4, kOfTwo = 2;  // keys, or sixteen values, at a time of one query and of two: as registers allow
#else
constexpr int kOfOne = 1, kOfTwo = 1;
#endif
constexpr int64_t kSerial = 1 << 18;  // products that cost less than waking a thread

// What is known after some positions of one query: the largest score, and sums relative to it.
struct Partial {
  float *most, *total, *values;  // [queries], [queries], [queries, padded]
};

class Attention {
 public:
  Attention(const Attend& a, int64_t tokens, int64_t start)
      : a_(a), c_(a.cache), start_(start), group_(a.heads / c_.kv_heads), queries_(tokens * group_),
        padded_(divide_up(c_.v_dim, 16) * 16), begin_(first(start)), end_(start + tokens),
        pieces_(smaller(kMostPieces, larger(int64_t(1), (end_ - begin_) / kPiece))),
        length_(divide_up(end_ - begin_, pieces_)), wide_(divide_up(c_.head_dim, 16) * 16), copies_(wide_ != c_.head_dim),
        scratch_(4 * (a.heads * tokens * (pieces_ * (padded_ + 2) + (copies_ ? wide_ : 0)))) {
    values_ = scratch_.as<float>();
    most_ = values_ + c_.kv_heads * pieces_ * queries_ * padded_;
    total_ = most_ + c_.kv_heads * pieces_ * queries_;
    q_ = total_ + c_.kv_heads * pieces_ * queries_;
    if (!copies_) return;
    for (int64_t i = 0; i < tokens * a.heads; i++) {  // zeros behind each query
      memset(q_ + i * wide_, 0, 4 * wide_);
      memcpy(q_ + i * wide_, a.q + i / a.heads * a.q_stride + i % a.heads * c_.head_dim, 4 * c_.head_dim);
    }
  }

  template <class T>
  void run(int threads) const {
    const int64_t products = queries_ * c_.kv_heads * (end_ - begin_) * (c_.head_dim + c_.v_dim);
    if (products < kSerial) threads = 1;
    parallel(c_.kv_heads * pieces_, 1, threads, [this](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; item++) piece<T>(item);
    });
    const int64_t merged = larger(int64_t(1), kSerial / (pieces_ * c_.v_dim));
    parallel(c_.kv_heads * queries_, merged, threads, [this](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; i++) merge(i / queries_, i % queries_);
    });
  }

 private:
  int64_t first(int64_t position) const {
    return a_.window ? larger(int64_t(0), position - a_.window + 1) : 0;
  }
  // Query i of a key-value head: token i / group, and query head i % group of those that share it.
  const float* query(int64_t head, int64_t i) const {
    const int64_t token = i / group_, of_query = head * group_ + i % group_;
    if (copies_) return q_ + (token * a_.heads + of_query) * wide_;
    return a_.q + token * a_.q_stride + of_query * c_.head_dim;
  }

  // A run of positions in consecutive slots.
  struct Block {
    int64_t position, count;
    const void *keys, *values;
    const float *key_scales, *value_scales;  // null if not int8
  };

  template <class T>
  void piece(int64_t item) const {
    const int64_t head = item / pieces_, from = begin_ + item % pieces_ * length_, to = smaller(end_, from + length_);
    float *values = values_ + item * queries_ * padded_, *most = most_ + item * queries_, *total = total_ + item * queries_;
    memset(values, 0, 4 * queries_ * padded_);
    memset(total, 0, 4 * queries_);
    for (int64_t i = 0; i < queries_; i++) most[i] = -from_bits(kInfinity);
    for (int64_t position = from, count; position < to; position += count) {
      const int64_t slot = position % c_.capacity, row = head * c_.capacity + slot;
      count = smaller(smaller(kBlock, to - position), c_.capacity - slot);
      const bool scaled = c_.dtype == kInt8;
      const Block block = {position, count, static_cast<const T*>(c_.keys) + row * c_.head_dim,
                           static_cast<const T*>(c_.values) + row * c_.v_dim, scaled ? c_.key_scales + row : nullptr,
                           scaled ? c_.value_scales + row : nullptr};
      for (int64_t i = 0; i < queries_; i += kQueries) {
        const Partial partial = {most + i, total + i, values + i * padded_};
        switch (smaller(int64_t(kQueries), queries_ - i)) {
          case 4: attend_block<T, 4, 1, 1>(block, head, i, partial); break;
          case 3: attend_block<T, 3, 1, 1>(block, head, i, partial); break;
          case 2: attend_block<T, 2, kOfTwo, kOfTwo>(block, head, i, partial); break;
          default: attend_block<T, 1, kOfOne, kOfOne>(block, head, i, partial);
        }
      }
    }
  }

  // kQ queries from i on. kRows keys, or kColumns * 16 values, at a time: as many sums as registers hold.
  template <class T, int kQ, int kRows, int kColumns>
  void attend_block(const Block& block, int64_t head, int64_t i, const Partial& partial) const {
    float weights[kQ][kBlock];
    const float* q[kQ];
    for (int s = 0; s < kQ; s++) q[s] = query(head, i + s);
    int64_t j = 0;
    for (; j + kRows <= block.count; j += kRows) score<T, kQ, kRows>(block, q, j, weights);
    for (; j < block.count; j++) score<T, kQ, 1>(block, q, j, weights);
    float factors[16] = {};
    for (int s = 0; s < kQ; s++) {
      const int64_t position = start_ + (i + s) / group_;
      factors[s] = partial.most[s];
      partial.most[s] = larger(partial.most[s], finish_scores(block, first(position), position + 1, weights[s]));
      factors[s] = factors[s] - origin(partial.most[s]);
    }
    exponentiate_some(factors);
    for (int s = 0; s < kQ; s++) {
      partial.total[s] = partial.total[s] * factors[s] + exponentiate(block, origin(partial.most[s]), weights[s]);
    }
    int64_t d = 0;
    for (; d + 16 * kColumns <= c_.v_dim; d += 16 * kColumns) add_values<T, kQ, kColumns>(block, weights, factors, d, 16, partial);
    for (; d + 16 <= c_.v_dim; d += 16) add_values<T, kQ, 1>(block, weights, factors, d, 16, partial);
    if (d < c_.v_dim) add_values<T, kQ, 1>(block, weights, factors, d, c_.v_dim - d, partial);
  }

  // What is subtracted from scores. If all are -infinity they stay so, and their weights are 0.
  static float origin(float most) { return most == -from_bits(kInfinity) ? 0.0f : most; }

  template <class T, int kQ, int kRows>
  QCLI_INLINE void score(const Block& block, const float* const* q, int64_t j, float (*weights)[kBlock]) const {
    const int64_t head_dim = c_.head_dim, v_dim = c_.v_dim;
    const T* keys = static_cast<const T*>(block.keys) + j * head_dim;
    for (int r = 0; r < kRows; r++) {  // the values will be needed next
      const T* values = static_cast<const T*>(block.values) + (j + r) * v_dim;
      for (int64_t d = 0; d < v_dim; d += 64 / sizeof(T)) __builtin_prefetch(values + d);
    }
    F32x16 sums[kRows][kQ];
    for (int r = 0; r < kRows; r++) {
      for (int s = 0; s < kQ; s++) sums[r][s] = all(0.0f);
    }
    int64_t d = 0;
    for (; d + 16 <= head_dim; d += 16) {
      for (int r = 0; r < kRows; r++) {
        const F32x16 key = load(keys + r * head_dim + d);
        for (int s = 0; s < kQ; s++) sums[r][s] = sums[r][s] + key * load(q[s] + d);
      }
    }
    if (d < head_dim) {
      for (int r = 0; r < kRows; r++) {
        const F32x16 key = load_some(keys + r * head_dim + d, head_dim - d);
        for (int s = 0; s < kQ; s++) sums[r][s] = sums[r][s] + key * load(q[s] + d);
      }
    }
    for (int r = 0; r < kRows; r++) {
      for (int s = 0; s < kQ; s++) weights[s][j + r] = sum_lanes(sums[r][s]);
    }
  }

  // Scales products to scores. Those outside [first, end) become -infinity. Returns the largest.
  __attribute__((noinline)) float finish_scores(const Block& block, int64_t first, int64_t end, float* scores) const {
    const float minus_infinity = -from_bits(kInfinity);
    const int64_t padded = divide_up(block.count, 16) * 16;
    for (int64_t j = block.count; j < padded; j++) scores[j] = minus_infinity;
    for (int64_t j = 0; j < block.count; j += 16) {
      F32x16 s = load(scores + j) * all(a_.scale);
      if (block.key_scales) s = s * load_some(block.key_scales + j, block.count - j);
      if (a_.softcap != 0.0f) s = all(a_.softcap) * hyperbolic_tangent(s / all(a_.softcap));
      store(scores + j, s);
    }
    for (int64_t j = 0; j < smaller(block.count, first - block.position); j++) scores[j] = minus_infinity;
    for (int64_t j = larger(int64_t(0), smaller(block.count, end - block.position)); j < padded; j++) scores[j] = minus_infinity;
    F32x16 most = all(minus_infinity);
    for (int64_t j = 0; j < padded; j += 16) most = maximum(load(scores + j), most);
    return max_lanes(most);
  }

  __attribute__((noinline)) static void exponentiate_some(float* sixteen) { store(sixteen, exp_negative(load(sixteen))); }

  // Scores to weights. Returns the sum of exp(score - origin).
  __attribute__((noinline)) float exponentiate(const Block& block, float origin, float* scores) const {
    F32x16 sum = all(0.0f);
    for (int64_t j = 0; j < block.count; j += 16) {
      F32x16 weight = exp_negative(load(scores + j) - all(origin));
      sum = sum + weight;
      if (block.value_scales) weight = weight * load_some(block.value_scales + j, block.count - j);
      store(scores + j, weight);
    }
    return sum_lanes(sum);
  }

  template <class T, int kQ, int kColumns>
  QCLI_INLINE void add_values(const Block& block, const float (*weights)[kBlock], const float* factors, int64_t d, int64_t some,
                              const Partial& partial) const {
    const int64_t v_dim = c_.v_dim;
    F32x16 sums[kQ][kColumns];
    for (int s = 0; s < kQ; s++) {
      for (int c = 0; c < kColumns; c++) sums[s][c] = load(partial.values + s * padded_ + d + 16 * c) * all(factors[s]);
    }
    const T* values = static_cast<const T*>(block.values) + d;
    for (int64_t j = 0; j < block.count; j++, values += v_dim) {
      for (int c = 0; c < kColumns; c++) {
        const F32x16 value = load_some(values + 16 * c, some);
        for (int s = 0; s < kQ; s++) sums[s][c] = sums[s][c] + value * all(weights[s][j]);
      }
    }
    for (int s = 0; s < kQ; s++) {
      for (int c = 0; c < kColumns; c++) store(partial.values + s * padded_ + d + 16 * c, sums[s][c]);
    }
  }

  void merge(int64_t head, int64_t i) const {
    const int64_t of_query = head * group_ + i % group_, at = head * pieces_ * queries_ + i;  // the next piece is queries_ further
    const float minus_infinity = -from_bits(kInfinity), sink = a_.sinks ? a_.sinks[of_query] : minus_infinity;
    float weights[kMostPieces + 16], most = sink;
    weights[0] = 1.0f, weights[1] = 0.0f;
    if (pieces_ > 1 || a_.sinks) {
      for (int64_t p = 0; p < pieces_; p++) most = larger(most, most_[at + p * queries_]);
      for (int64_t p = 0; p < pieces_; p++) weights[p] = most_[at + p * queries_] - origin(most);
      weights[pieces_] = sink - origin(most);
      for (int64_t p = pieces_ + 1; p < divide_up(pieces_ + 1, 16) * 16; p++) weights[p] = minus_infinity;
      for (int64_t p = 0; p <= pieces_; p += 16) exponentiate_some(weights + p);
    }
    float total = weights[pieces_];
    for (int64_t p = 0; p < pieces_; p++) total += weights[p] * total_[at + p * queries_];
    const float share = 1.0f / total;
    float* y = a_.y + i / group_ * a_.y_stride + of_query * c_.v_dim;
    for (int64_t d = 0; d < c_.v_dim; d += 16) {
      F32x16 sum = all(0.0f);
      for (int64_t p = 0; p < pieces_; p++) sum = sum + load(values_ + (at + p * queries_) * padded_ + d) * all(weights[p]);
      store_some(y + d, sum * all(share), c_.v_dim - d);
    }
  }

  const Attend& a_;
  const Cache& c_;
  int64_t start_, group_, queries_, padded_, begin_, end_, pieces_, length_, wide_;
  bool copies_;
  Scratch scratch_;
  float *values_, *most_, *total_, *q_;
};

template <class T>
void attend(const Attend& a, int64_t tokens, int64_t start, int threads) {
  Attention(a, tokens, start).run<T>(threads);
}

}  // namespace

QCLI_STEP(attend) {
  const Attend& a = *static_cast<const Attend*>(record);
  QCLI_CACHE_DISPATCH(int(a.cache.dtype), attend, a, tokens, start, threads)
}
