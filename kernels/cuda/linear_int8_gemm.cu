// LLM.int8() for many tokens in one kernel: scales, outliers and bias are applied to the sums while they are in registers.
// Symbols as in linear_int8.cuh. DTYPE is __half or __nv_bfloat16, columns are a multiple of 16.
//
//   q         int8 [tokens, columns], x_absmax float32 [tokens]: x quantized
//   list      int32 [count], the outlier columns;  count int32 [1];  both null without a threshold
//
// A block of eight warps makes 128 tokens x 128 rows of y, a warp makes 64 x 32. cp.async copies a stage of 64 columns at a time,
// STAGES - 1 stages ahead of the tensor cores (mma m16n8k32); ldmatrix loads it. A stage's rows have 64 bytes, four pieces of 16.
// The position of a piece within its row is XORed with half the row's number, so the eight rows of an ldmatrix are in all banks.
// The outlier columns, and after them the fixed ones, are a product too, of 16-bit values over 16 columns at a time (mma m16n8k16), added to the same registers.
// Neighbouring blocks share the weight's rows, so device memory delivers each row once.
//
// Operations: 2 tokens rows columns, at the int8 rate. Bytes: x, W and y once each, without an int32 result in between.
// prebuilt: DTYPE={__half,__nv_bfloat16} STAGES={3,4}
#include "linear_int8.cuh"

constexpr int TILE_M = 128, TILE_N = 128, DEPTH = 64, THREADS = 256;
constexpr int STAGE_BYTES = (TILE_M + TILE_N) * DEPTH;
constexpr int WARP_M = 64, WARP_N = 32;
constexpr int KEPT = 16;               // outlier columns at a time
constexpr int KEPT_PITCH = KEPT + 8;  // values; the padding puts eight rows in different banks

// The offset of a piece of 16 bytes in a stage.
__device__ inline int place(int row, int piece) { return row * DEPTH + 16 * (piece ^ (row / 2 & 3)); }

// The block's part of x or W: 128 rows, of which `rows` exist.
struct Part {
  const int8_t* first;
  uint32_t rows;
};

constexpr int PIECES = DEPTH / 16, STEP = THREADS / PIECES;  // pieces of 16 bytes per row; distance of a thread's rows

__device__ inline void begin_stage(unsigned char* stage, const Part& part, uint32_t columns, uint32_t column) {
  const uint32_t piece = threadIdx.x % PIECES, first = threadIdx.x / PIECES;
  const bool inside = column + 16 * piece < columns;
#pragma unroll
  for (int i = 0; i < TILE_M / STEP; ++i) {
    const uint32_t row = first + i * STEP;
    const bool valid = inside && row < part.rows;
    copy_async(stage + place(row, piece), part.first + (valid ? row * columns + column + 16 * piece : 0), valid);
  }
}

KERNEL void __launch_bounds__(THREADS, 2)
    linear_int8_gemm(const int8_t* __restrict__ q, const float* __restrict__ x_absmax, const int8_t* __restrict__ weight,
                     const float* __restrict__ scale, const Scalar* __restrict__ x, const int* __restrict__ list,
                     const int* __restrict__ count, const Bias* __restrict__ bias, long long tokens, long long rows,
                     uint32_t columns, const int* __restrict__ fixed, const Scalar* __restrict__ original, uint32_t fixed_count,
                     Scalar* __restrict__ y) {
  DYNAMIC_SHARED(unsigned char, stages);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int warp_m = warp % 2 * WARP_M, warp_n = warp / 2 * WARP_N;
  const long long first_token = (long long)blockIdx.x * TILE_M, first_row = (long long)blockIdx.y * TILE_N;
  const int turns = int((columns + DEPTH - 1) / DEPTH);

  static_assert(TILE_M == TILE_N, "both parts are copied alike");
  const Part of_x = {q + first_token * columns, uint32_t(min(tokens - first_token, (long long)TILE_M))};
  const Part of_w = {weight + first_row * columns, uint32_t(min(rows - first_row, (long long)TILE_N))};
  auto begin = [&](int turn) {
    unsigned char* stage = stages + turn % STAGES * STAGE_BYTES;
    begin_stage(stage, of_x, columns, turn * DEPTH);
    begin_stage(stage + TILE_M * DEPTH, of_w, columns, turn * DEPTH);
  };
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) {
    if (s < turns) begin(s);
    commit_copies();
  }
  int sum[WARP_M / 16][WARP_N / 8][4] = {};
  for (int turn = 0; turn < turns; ++turn) {
    wait_for_copies<STAGES - 2>();
    __syncthreads();  // this stage has arrived, and all threads have finished the previous one
    const int ahead = turn + STAGES - 1;
    if (ahead < turns) begin(ahead);
    commit_copies();
    const unsigned char* stage = stages + turn % STAGES * STAGE_BYTES;
#pragma unroll
    for (int step = 0; step < DEPTH / 32; ++step) {
      uint32_t a[WARP_M / 16][4], b[WARP_N / 16][4];
#pragma unroll
      for (int m = 0; m < WARP_M / 16; ++m) {  // 16 bytes of rows 0-7 and 8-15, then the next 16 bytes
        load_matrices(a[m], stage + place(warp_m + 16 * m + lane % 16, 2 * step + lane / 16));
      }
#pragma unroll
      for (int n = 0; n < WARP_N / 16; ++n) {  // two times 16 bytes of rows 0-7, then of rows 8-15
        load_matrices(b[n], stage + place(TILE_M + warp_n + 16 * n + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
      }
#pragma unroll
      for (int m = 0; m < WARP_M / 16; ++m) {
#pragma unroll
        for (int n = 0; n < WARP_N / 8; ++n) mma_16x8x32(sum[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
      }
    }
  }

  float result[WARP_M / 16][WARP_N / 8][4];
#pragma unroll
  for (int m = 0; m < WARP_M / 16; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const long long token = first_token + warp_m + 16 * m + 8 * half + g;
      const float factor = token < tokens ? __ldg(x_absmax + token) : 0.0f;
#pragma unroll
      for (int n = 0; n < WARP_N / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const long long row = first_row + warp_n + 8 * n + 2 * t + i;
          const float of_row = row < rows ? __ldg(scale + row) : 0.0f;
          result[m][n][2 * half + i] = ordinary(sum[m][n][2 * half + i], factor, of_row);
        }
      }
    }
  }

  wait_for_copies<0>();
  Scalar* x_kept = reinterpret_cast<Scalar*>(stages);    // [TILE_M][KEPT_PITCH]
  Scalar* w_kept = x_kept + TILE_M * KEPT_PITCH;         // [TILE_N][KEPT_PITCH]
  const uint32_t outliers = count ? *count : 0, apart = outliers + fixed_count;
  for (uint32_t first = 0; first < apart; first += KEPT) {
    __syncthreads();  // the stages, or the previous columns, have been read
    for (uint32_t i = threadIdx.x; i < TILE_M * KEPT; i += THREADS) {
      const uint32_t row = i / KEPT, j = first + i % KEPT;
      const uint32_t column = j < outliers ? list[j] : j < apart ? fixed[j - outliers] : columns;
      Scalar value = from_float<Scalar>(0.0f), factor = value;
      if (column < columns && row < of_x.rows) value = x[first_token * columns + row * columns + column];
      if (column < columns && row < of_w.rows) {
        factor = j < outliers ? dequantized(of_w.first[row * columns + column], __ldg(scale + first_row + row))
                              : original[(first_row + row) * fixed_count + j - outliers];
      }
      x_kept[row * KEPT_PITCH + i % KEPT] = value;
      w_kept[row * KEPT_PITCH + i % KEPT] = factor;
    }
    __syncthreads();
    auto pair = [&](const Scalar* of, int row, int column) {
      return *reinterpret_cast<const uint32_t*>(of + row * KEPT_PITCH + column + 2 * t);
    };
#pragma unroll
    for (int m = 0; m < WARP_M / 16; ++m) {
      const int row = warp_m + 16 * m + g;
      const uint32_t a[4] = {pair(x_kept, row, 0), pair(x_kept, row + 8, 0), pair(x_kept, row, 8), pair(x_kept, row + 8, 8)};
#pragma unroll
      for (int n = 0; n < WARP_N / 8; ++n) {
        const int column = warp_n + 8 * n + g;
        mma_16x8x16(result[m][n], a, pair(w_kept, column, 0), pair(w_kept, column, 8), Scalar());
      }
    }
  }

#pragma unroll
  for (int n = 0; n < WARP_N / 8; ++n) {
    const long long row = first_row + warp_n + 8 * n + 2 * t;
    if (row >= rows) continue;
    const bool both = row + 1 < rows;
    const float added[2] = {bias ? to_float(bias[row]) : 0.0f, bias && both ? to_float(bias[row + 1]) : 0.0f};
#pragma unroll
    for (int m = 0; m < WARP_M / 16; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const long long token = first_token + warp_m + 16 * m + 8 * half + g;
        if (token >= tokens) continue;
        const float low = result[m][n][2 * half] + added[0], high = result[m][n][2 * half + 1] + added[1];
        Scalar* to = y + token * rows + row;
        if (both && rows % 2 == 0) {
          *reinterpret_cast<uint32_t*>(to) = pack2<Scalar>(low, high);
        } else {
          to[0] = from_float<Scalar>(low);
          if (both) to[1] = from_float<Scalar>(high);
        }
      }
    }
  }
}
