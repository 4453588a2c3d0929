// LLM.int8() for up to eight tokens, from activations to result in one launch. Symbols as in linear_int8.cuh.
//
//   threshold  magnitude from which on an activation is an outlier; 0 means no outliers
//   FULL       1 if columns are a multiple of 256, else 0; columns are a multiple of 16
//
// The limit is the bandwidth at which the weight is read, one byte per element. One token costs as much as eight.
//   - Every block quantizes the tokens itself, into shared memory. They are few and in L2, and a separate launch would cost
//     more. A bit mask in shared memory marks the columns with an outlier, another the fixed ones.
//   - Tensor cores make the product (mma m16n8k32): 16 rows of W are its A, the tokens its B. The order of k within an mma is
//     free, as long as A and B agree. Lane (g, t) takes the 16 consecutive k at 16 t of a chunk of 64, of rows g and g + 8 and
//     of token g, as they are stored. Nothing is decoded; two instructions multiply 16 bytes of two rows.
//   - A block takes 16 rows at a time. Its warps divide the columns, four chunks per turn, while the next turn is loading. Their
//     sums are added in shared memory, together with the outliers' part, in which each thread reads a 16th of the mask.
// prebuilt: DTYPE={float,__half,__nv_bfloat16} FULL={0,1}
#include "int8_turns.cuh"

constexpr int PARTS = THREADS / TILE;

// The pitch of q's rows in shared memory is 64 bytes more than a multiple of 128, so two tokens are in different banks.
__device__ inline int pitch_of(int columns) { return (columns + 63) / 128 * 128 + 64; }

KERNEL void __launch_bounds__(THREADS, 2)
    linear_int8(const Scalar* __restrict__ x, int tokens, const int8_t* __restrict__ weight, const float* __restrict__ scale,
                const Bias* __restrict__ bias, long long rows, int columns, float threshold, const int* __restrict__ fixed,
                const Scalar* __restrict__ original, int fixed_count, Scalar* __restrict__ y) {
  DYNAMIC_SHARED(unsigned char, bytes);
  const int pitch = pitch_of(columns), mask_words = (columns + 31) / 32;
  int* sums = reinterpret_cast<int*>(bytes);                                      // [2][WARPS][MOST][PITCH]
  float* kept = reinterpret_cast<float*>(sums + 2 * WARPS * SUMS);         // [PARTS][MOST][TILE]
  uint32_t* x_absmax = reinterpret_cast<uint32_t*>(kept + PARTS * MOST * TILE);   // [MOST]
  uint32_t* any = x_absmax + MOST;                                                // [4], the first one used
  unsigned char* q = reinterpret_cast<unsigned char*>(any + 4);                   // [tokens][pitch]
  uint32_t* mask = reinterpret_cast<uint32_t*>(q + tokens * pitch);               // [mask_words]
  uint32_t* taken = mask + mask_words;                                            // [mask_words], of the fixed columns
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int chunks = (columns + CHUNK - 1) / CHUNK, turns = (chunks + TURN - 1) / TURN;
  const long long tiles = (rows + TILE - 1) / TILE;

  Turns weights = {weight, rows, columns, g, t};  // the first loads begin before x is read
  weights.go_to(blockIdx.x);
  if (warp < turns) weights.load(warp);

  if (threadIdx.x < MOST) x_absmax[threadIdx.x] = 0;
  if (threadIdx.x == 0) *any = 0;
  for (int i = threadIdx.x; i < 2 * mask_words; i += THREADS) mask[i] = 0;
  __syncthreads();
  if (fixed_count) {
    for (int i = threadIdx.x; i < fixed_count; i += THREADS) atomicOr(taken + fixed[i] / 32, 1u << fixed[i] % 32);
    __syncthreads();
  }
  for (int m = 0; m < tokens; ++m) {
    uint32_t largest = 0;
    for (int column = threadIdx.x * 8; column < columns; column += THREADS * 8) {
      float values[8];
      load8_kept(x + (long long)m * columns + column, values);
      const uint32_t apart = taken[column / 32] >> column % 32;
      uint32_t found = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const bool rounded = !(apart >> i & 1);
        const bool outlier = rounded && threshold > 0.0f && fabsf(values[i]) >= threshold;
        found |= uint32_t(outlier) << i;
        if (rounded && !outlier) largest = max(largest, magnitude(values[i]));
      }
      if (found) {
        atomicOr(mask + column / 32, found << column % 32);
        *any = 1;
      }
    }
    largest = group_max(largest, 32);
    if (lane == 0) atomicMax(x_absmax + m, largest);
  }
  __syncthreads();
  for (int m = 0; m < tokens; ++m) {
    const RowScale factors = row_scale(__uint_as_float(x_absmax[m]));
    for (int column = threadIdx.x * 8; column < columns; column += THREADS * 8) {
      float values[8];
      load8_kept(x + (long long)m * columns + column, values);
      const uint32_t outliers = (mask[column / 32] | taken[column / 32]) >> column % 32;
      uint32_t words[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        words[i / 4] |= (outliers >> i & 1 ? 0u : uint32_t(quantized(values[i], factors)) & 0xff) << 8 * (i % 4);
      }
      *reinterpret_cast<uint2*>(q + m * pitch + column) = make_uint2(words[0], words[1]);
    }
  }
  __syncthreads();

  const bool decompose = *any != 0 || fixed_count;
  int parity = 0;
  for (long long tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    int total[4] = {0, 0, 0, 0};
    for (int turn = warp; turn < turns; turn += WARPS) {
      uint4 words[TURN][2];
      weights.take(words, turn, turns, warp, tile + gridDim.x);
#pragma unroll
      for (int c = 0; c < TURN; ++c) {
        const int column = (turn * TURN + c) * CHUNK;
        uint4 b = make_uint4(0, 0, 0, 0);
        if (g < tokens && weights.inside(column)) b = *reinterpret_cast<const uint4*>(q + g * pitch + column + 16 * t);
        const uint32_t first[4] = {words[c][0].x, words[c][1].x, words[c][0].y, words[c][1].y};
        const uint32_t second[4] = {words[c][0].z, words[c][1].z, words[c][0].w, words[c][1].w};
        mma_16x8x32(total, first, b.x, b.y);
        mma_16x8x32(total, second, b.z, b.w);
      }
    }
    int* here = sums + parity * WARPS * SUMS;
#pragma unroll
    for (int i = 0; i < 4; ++i) here[warp * SUMS + (2 * t + i % 2) * PITCH + g + 8 * (i / 2)] = total[i];
    if (decompose) {
      const int part = threadIdx.x / TILE;
      const long long row = min(tile * TILE + threadIdx.x % TILE, rows - 1);
      const float row_scale_of_w = __ldg(scale + row);
      float sum[MOST] = {};
      for (int w = part; w < mask_words; w += PARTS) {
        for (uint32_t left = mask[w]; left; left &= left - 1) {
          const int column = w * 32 + __ffs(int(left)) - 1;
          const float value = to_float(dequantized(__ldg(weight + row * columns + column), row_scale_of_w));
#pragma unroll
          for (int m = 0; m < MOST; ++m) {
            if (m < tokens) sum[m] = fmaf(to_float(x[(long long)m * columns + column]), value, sum[m]);
          }
        }
      }
      for (int j = part; j < fixed_count; j += PARTS) {
        const float value = to_float(original[row * fixed_count + j]);
#pragma unroll
        for (int m = 0; m < MOST; ++m) {
          if (m < tokens) sum[m] = fmaf(to_float(x[(long long)m * columns + fixed[j]]), value, sum[m]);
        }
      }
#pragma unroll
      for (int m = 0; m < MOST; ++m) kept[(part * MOST + m) * TILE + threadIdx.x % TILE] = sum[m];
    }
    __syncthreads();
    if (threadIdx.x < MOST * TILE) {
      const int m = threadIdx.x / TILE;
      const long long row = tile * TILE + threadIdx.x % TILE;
      if (m < tokens && row < rows) {
        int product = 0;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) product += here[i * SUMS + m * PITCH + threadIdx.x % TILE];
        float sum = ordinary(product, __uint_as_float(x_absmax[m]), __ldg(scale + row));
        if (decompose) {
          float outliers = 0.0f;
#pragma unroll
          for (int i = 0; i < PARTS; ++i) outliers += kept[i * MOST * TILE + threadIdx.x];
          sum += outliers;
        }
        if (bias) sum += to_float(bias[row]);
        y[m * rows + row] = from_float<Scalar>(sum);
      }
    }
    if (decompose) __syncthreads();  // the next tile overwrites `kept`
    parity ^= 1;
  }
}
