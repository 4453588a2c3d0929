// The product with a 4-bit weight for 9 to 64 tokens. Sizes and names are those of linear_4bit.cu.
//
//   TOKENS  16, 32 or 64: the most tokens of a launch
//   STAGES  turns in shared memory at once
//   CHUNK   64
//
// Here each element of W multiplies TOKENS values of x, so x would be read too often. A block therefore takes 64 rows, four times
// as many, and reads its x once for all of them. Per turn of four chunks, cp.async copies W and x, STAGES - 1 turns ahead. Of the
// eight warps, two divide the rows and four the chunks. A warp decodes 32 rows of its chunk once, and multiplies them with eight
// tokens at a time. The four partial sums are added in shared memory. Rows of both tiles are padded to avoid bank conflicts.
//
// If the rows alone do not fill the GPU, gridDim.y blocks share a tile's columns, and leave float32 sums in
//   parts  float32 [gridDim.y, tokens, rows], null for one part
// merge_parts adds them up: they are small, and still in L2.
// prebuilt: DTYPE={__half,__nv_bfloat16} CHUNK={64} SCALES={0,1,2,3} TOKENS={16,32,64} STAGES={2,3}
// prebuilt: DTYPE={__half,__nv_bfloat16} CHUNK={64} SCALES={2} ZERO={1} TOKENS={16,32,64} STAGES={2,3}
#include "linear_4bit.cuh"

constexpr int ROWS = 64;
constexpr int COLUMNS = TURN * CHUNK;            // per turn
constexpr int CODES_PITCH = COLUMNS / 2 + 32;    // bytes
constexpr int X_PITCH = COLUMNS * 2 + 16;        // bytes
constexpr int CODES_BYTES = ROWS * CODES_PITCH;  // per stage
constexpr int STAGE_BYTES = CODES_BYTES + TOKENS * X_PITCH;
constexpr int THREADS = 256;
constexpr int SUMS_PITCH = ROWS + 4;
constexpr int GROUPS = TOKENS / 8;

// What a thread copies in each turn: the same 16 bytes of several rows of W, and of several rows of x.
struct Source {
  const uint8_t* packed;  // the block's first row
  const Scalar* x;
  uint32_t code, value;         // offsets of the thread's first 16 bytes: in bytes, in values
  uint32_t code_row, value_row; // the thread's first rows
  uint32_t rows, tokens;        // valid ones in this block
};

constexpr int CODES_PIECES = COLUMNS / 32, X_PIECES = COLUMNS / 8;  // pieces of 16 bytes per row and turn
constexpr int CODES_STEP = THREADS / CODES_PIECES, X_STEP = THREADS / X_PIECES;

__device__ inline void begin_turn(unsigned char* stage, const Source& from, int columns, int turn) {
  const uint32_t code_piece = threadIdx.x % CODES_PIECES, x_piece = threadIdx.x % X_PIECES;
  const bool code_valid = turn * COLUMNS + int(code_piece) * 32 < columns;
  const bool x_valid = turn * COLUMNS + int(x_piece) * 8 < columns;
  uint32_t offset = from.code + turn * (COLUMNS / 2);
#pragma unroll
  for (int i = 0; i < ROWS / CODES_STEP; ++i, offset += CODES_STEP * (columns / 2)) {
    const uint32_t row = from.code_row + i * CODES_STEP;
    const bool valid = code_valid && row < from.rows;
    copy_async(stage + row * CODES_PITCH + code_piece * 16, valid ? from.packed + offset : from.packed, valid);
  }
  offset = from.value + turn * COLUMNS;
#pragma unroll
  for (int i = 0; i < TOKENS / X_STEP; ++i, offset += X_STEP * columns) {
    const uint32_t token = from.value_row + i * X_STEP;
    const bool valid = x_valid && token < from.tokens;
    copy_async(stage + CODES_BYTES + token * X_PITCH + x_piece * 16, valid ? from.x + offset : from.x, valid);
  }
}

KERNEL void __launch_bounds__(THREADS, TOKENS <= 32 ? 2 : 1)
    linear_4bit_batch(const Scalar* __restrict__ x, int tokens, const uint8_t* __restrict__ packed,
                      const Stored* __restrict__ absmax, const float* __restrict__ nested, float offset,
                      const Scalar* __restrict__ bias, long long rows, int columns, int block_size,
                      const __grid_constant__ Codebook codebook,
                      const __grid_constant__ ByteMap byte_map, const int8_t* __restrict__ zero, Scalar* __restrict__ y,
                      float* __restrict__ parts) {
  DYNAMIC_SHARED(uint32_t, table);
  Entry* map = reinterpret_cast<Entry*>(table + TABLE);  // [256]
  unsigned char* stages = reinterpret_cast<unsigned char*>(map + 256);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int half = warp % 2, part = warp / 2;  // this warp's 32 rows, and its chunk of a turn
  const int chunks = columns / CHUNK, all_turns = (chunks + TURN - 1) / TURN;
  const int first_turn = int((long long)all_turns * blockIdx.y / gridDim.y);
  const int turns = int((long long)all_turns * (blockIdx.y + 1) / gridDim.y) - first_turn;  // in this part
  const long long first_row = (long long)blockIdx.x * ROWS;
  const uint32_t mine = shared_address(table + lane);
  const Scales scales = {absmax, nested, offset, zero};
  const float shared = shared_scale(scales);

  Source source = {packed + first_row * (columns / 2), x};
  source.code_row = threadIdx.x / CODES_PIECES;
  source.value_row = threadIdx.x / X_PIECES;
  source.code = source.code_row * (columns / 2) + threadIdx.x % CODES_PIECES * 16;
  source.value = source.value_row * columns + threadIdx.x % X_PIECES * 8;
  source.rows = uint32_t(min(rows - first_row, (long long)ROWS));
  source.tokens = uint32_t(tokens);
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) {
    if (s < turns) begin_turn(stages + s * STAGE_BYTES, source, columns, first_turn + s);
    commit_copies();
  }
  fill_table(table, codebook);
  if constexpr (MAPPED) map[threadIdx.x] = entry_of(byte_map.value[threadIdx.x]);

  uint32_t row_block[4];  // the first blocks of rows g, g + 8, g + 16 and g + 24
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    row_block[r] = uint32_t(min(first_row + half * 32 + r * 8 + g, rows - 1) * (columns / block_size));
  }
  RawScale next_scale[4];
  auto load = [&](int turn) {
    const int chunk = min((first_turn + turn) * TURN + part, chunks - 1);
#pragma unroll
    for (int r = 0; r < 4; ++r) next_scale[r] = load_scale(scales, row_block[r] + block_of(chunk, t, block_size));
  };
  load(0);

  float total[2][GROUPS][4] = {};
  for (int turn = 0; turn < turns; ++turn) {
    wait_for_copies<STAGES - 2>();
    __syncthreads();  // this turn has arrived, and all threads have finished the previous one
    const int ahead = turn + STAGES - 1;
    if (ahead < turns) begin_turn(stages + ahead % STAGES * STAGE_BYTES, source, columns, first_turn + ahead);
    commit_copies();
    const unsigned char* stage = stages + turn % STAGES * STAGE_BYTES;
    float scale[4];
    uint32_t pair[2][2];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float value = absmax_of(next_scale[r], map, shared);
      scale[r] = (first_turn + turn) * TURN + part < chunks ? value : 0.0f;
      pair[r / 2][r % 2] = pair_of(next_scale[r], map);
    }
    load(turn + 1);

    uint32_t a[2][STEPS][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      Codes codes;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const unsigned char* from =
            stage + (half * 32 + m * 16 + r * 8 + g) * CODES_PITCH + part * (CHUNK / 2) + t * (CHUNK / 8);
#pragma unroll
        for (int i = 0; i < WORDS; ++i) codes.word[r][i] = reinterpret_cast<const uint32_t*>(from)[i];
      }
#pragma unroll
      for (int s = 0; s < STEPS; ++s) decode(mine, codes, s, pair[m], a[m][s]);
    }
#pragma unroll
    for (int n = 0; n < GROUPS; ++n) {
      const unsigned char* from = stage + CODES_BYTES + (n * 8 + g) * X_PITCH + part * (CHUNK * 2) + t * (CHUNK / 2);
      uint32_t b[2 * STEPS];
#pragma unroll
      for (int i = 0; i < WORDS; ++i) {
        const uint4 bits = reinterpret_cast<const uint4*>(from)[i];
        b[4 * i] = bits.x;
        b[4 * i + 1] = bits.y;
        b[4 * i + 2] = bits.z;
        b[4 * i + 3] = bits.w;
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        float sum[4] = {0, 0, 0, 0};
#pragma unroll
        for (int s = 0; s < STEPS; ++s) mma_16x8x16(sum, a[m][s], b[2 * s], b[2 * s + 1], Scalar());
#pragma unroll
        for (int i = 0; i < 4; ++i) total[m][n][i] = fmaf(scale[2 * m + i / 2], sum[i], total[m][n][i]);
      }
    }
  }

  wait_for_copies<0>();
  __syncthreads();  // the stages are free
  float* sums = reinterpret_cast<float*>(stages);  // [TURN][TOKENS][SUMS_PITCH]
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < GROUPS; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = n * 8 + 2 * t + i % 2, row = half * 32 + m * 16 + i / 2 * 8 + g;
        sums[(part * TOKENS + token) * SUMS_PITCH + row] = total[m][n][i];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < TOKENS * ROWS; i += THREADS) {
    const int token = i / ROWS;
    const long long row = first_row + i % ROWS;
    if (token >= tokens || row >= rows) continue;
    float sum = bias && !parts ? to_float(bias[row]) : 0.0f;
#pragma unroll
    for (int p = 0; p < TURN; ++p) sum += sums[(p * TOKENS + token) * SUMS_PITCH + i % ROWS];
    const long long at = (long long)token * rows + row;
    if (parts) {
      parts[(long long)blockIdx.y * tokens * rows + at] = sum;
    } else {
      y[at] = from_float<Scalar>(sum);
    }
  }
}

// Adds the parts, in their order, and the bias. A thread makes one element.
KERNEL void __launch_bounds__(THREADS)
    merge_parts(const float* __restrict__ parts, int count, const Scalar* __restrict__ bias, long long elements, long long rows,
                Scalar* __restrict__ y) {
  const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
  if (i >= elements) return;
  float sum = bias ? to_float(bias[i % rows]) : 0.0f;
  for (int p = 0; p < count; ++p) sum += __ldg(parts + p * elements + i);
  y[i] = from_float<Scalar>(sum);
}
