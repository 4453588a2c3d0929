// LLM.int8() for many tokens: the steps before and after an int8 product that a library makes. Symbols as in linear_int8.cuh.
//
//   marks    uint8 [columns], not 0 where a column has an outlier
//   list     int32 [columns]; its first `count` entries are the numbers of those columns, ascending;  count int32 [1]
//   product  int32 [tokens, rows]
//
// list_outliers: one block of 1024 threads reads all marks. Votes and a prefix sum give the position of each number. The count
// stays on the device: later kernels loop up to it. The list has room for every column.
//
// linear_int8_epilogue: a block takes 32 tokens of 128 rows, a thread four of each. It copies x and W of 16 outlier columns at a
// time to shared memory, and of the fixed columns after them. Bytes moved: 4 + sizeof(DTYPE) per element of y, far less than the product needs.
// prebuilt: DTYPE={float,__half,__nv_bfloat16}
#include "linear_int8.cuh"

constexpr int LIST_THREADS = 1024;

KERNEL void __launch_bounds__(LIST_THREADS)
    list_outliers(const uint8_t* __restrict__ marks, int columns, int* __restrict__ list, int* __restrict__ count) {
  __shared__ int found[LIST_THREADS / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int before = 0;  // outliers in the columns so far
  for (int first = 0; first < columns; first += LIST_THREADS) {
    const int column = first + threadIdx.x;
    const bool outlier = column < columns && marks[column];
    const uint32_t votes = __ballot_sync(WHOLE_WARP, outlier);
    if (lane == 0) found[warp] = __popc(votes);
    __syncthreads();
    int place = before + __popc(votes & ((1u << lane) - 1));
    for (int w = 0; w < LIST_THREADS / 32; ++w) {
      place += w < warp ? found[w] : 0;
      before += found[w];
    }
    if (outlier) list[place] = column;
    __syncthreads();
  }
  if (threadIdx.x == 0) *count = before;
}

constexpr int TOKENS = 32, ROWS = 128, DEPTH = 16;
constexpr int EACH = 4;  // tokens, and rows, per thread
constexpr int ACROSS = ROWS / EACH;

KERNEL void __launch_bounds__(256)
    linear_int8_epilogue(const int* __restrict__ product, const float* __restrict__ x_absmax, const float* __restrict__ scale,
                         const Scalar* __restrict__ x, const int8_t* __restrict__ weight, const int* __restrict__ list,
                         const int* __restrict__ count, const Bias* __restrict__ bias, long long tokens, long long rows,
                         int columns, const int* __restrict__ fixed, const Scalar* __restrict__ original, int fixed_count,
                         Scalar* __restrict__ y) {
  __shared__ float x_kept[DEPTH][TOKENS + 1];
  __shared__ __align__(16) float w_kept[DEPTH][ROWS + 4];  // read four at a time
  const long long first_token = (long long)blockIdx.x * TOKENS, first_row = (long long)blockIdx.y * ROWS;
  const int across = threadIdx.x % ACROSS, down = threadIdx.x / ACROSS;
  float sum[EACH][EACH] = {};
  const int outliers = count ? *count : 0, apart = outliers + fixed_count;
  for (int first = 0; first < apart; first += DEPTH) {
    for (int i = threadIdx.x; i < DEPTH * TOKENS; i += 256) {
      const int j = first + i % DEPTH;
      const long long token = first_token + i / DEPTH;
      const bool valid = j < apart && token < tokens;
      x_kept[i % DEPTH][i / DEPTH] = valid ? to_float(x[token * columns + (j < outliers ? list[j] : fixed[j - outliers])]) : 0.0f;
    }
    for (int i = threadIdx.x; i < DEPTH * ROWS; i += 256) {
      const int j = first + i % DEPTH;
      const long long row = first_row + i / DEPTH;
      float value = 0.0f;
      if (j < outliers && row < rows) {
        value = to_float(dequantized(weight[row * columns + list[j]], scale[row]));
      } else if (j < apart && row < rows) {
        value = to_float(original[row * fixed_count + j - outliers]);
      }
      w_kept[i % DEPTH][i / DEPTH] = value;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < DEPTH; ++j) {
      const float4 w = *reinterpret_cast<const float4*>(&w_kept[j][across * EACH]);
#pragma unroll
      for (int m = 0; m < EACH; ++m) {
        const float value = x_kept[j][down * EACH + m];
        sum[m][0] = fmaf(value, w.x, sum[m][0]);
        sum[m][1] = fmaf(value, w.y, sum[m][1]);
        sum[m][2] = fmaf(value, w.z, sum[m][2]);
        sum[m][3] = fmaf(value, w.w, sum[m][3]);
      }
    }
    __syncthreads();
  }
  const long long row = first_row + across * EACH;
  float scales[EACH], added[EACH];
#pragma unroll
  for (int n = 0; n < EACH; ++n) {
    scales[n] = row + n < rows ? __ldg(scale + row + n) : 0.0f;
    added[n] = bias && row + n < rows ? to_float(bias[row + n]) : 0.0f;
  }
  const bool whole = rows % EACH == 0 && row < rows;
#pragma unroll
  for (int m = 0; m < EACH; ++m) {
    const long long token = first_token + down * EACH + m;
    if (token >= tokens) break;
    const float factor = x_absmax[token];
    const int* from = product + token * rows + row;
    Scalar* to = y + token * rows + row;
    if (whole) {
      const int4 four = __ldcs(reinterpret_cast<const int4*>(from));
      const int products[EACH] = {four.x, four.y, four.z, four.w};
      float values[EACH];
#pragma unroll
      for (int n = 0; n < EACH; ++n) values[n] = ordinary(products[n], factor, scales[n]) + sum[m][n] + added[n];
      store4(to, values);
    } else {
      for (int n = 0; n < EACH && row + n < rows; ++n) {
        to[n] = from_float<Scalar>(ordinary(from[n], factor, scales[n]) + sum[m][n] + added[n]);
      }
    }
  }
}
