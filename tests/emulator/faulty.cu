// Kernels with one fault each, for the tests of the emulator itself.
#include "common.cuh"

// Reads what another thread writes, without a barrier.
KERNEL void no_barrier(float* out) {
  __shared__ float values[64];
  values[threadIdx.x] = float(threadIdx.x);
  out[threadIdx.x] = values[(threadIdx.x + 1) % 64];
}

KERNEL void with_barrier(float* out) {
  __shared__ float values[64];
  values[threadIdx.x] = float(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + 1) % 64];
}

KERNEL void divergent(float* out) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = 1;
}

KERNEL void two_barriers(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

KERNEL void divergent_shuffle(float* out) {
  if (threadIdx.x % 2) out[threadIdx.x] = __shfl_xor_sync(WHOLE_WARP, 1.0f, 2);
}

KERNEL void part_of_a_warp(float* out) { out[threadIdx.x] = __shfl_xor_sync(0xffff, 1.0f, 2); }

KERNEL void unset_shared(float* out) {
  __shared__ float values[64];
  DYNAMIC_SHARED(float, more);
  if (threadIdx.x == 0) values[0] = more[0] = 3;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x] + more[threadIdx.x];
}

KERNEL void not_waited_for(const float* from, float* out) {
  DYNAMIC_SHARED(float, values);
  copy_async(values + 4 * threadIdx.x, from + 4 * threadIdx.x, true);
  commit_copies();
  out[threadIdx.x] = values[4 * threadIdx.x];
}

KERNEL void waited_for(const float* from, float* out) {
  DYNAMIC_SHARED(float, values);
  copy_async(values + 4 * threadIdx.x, from + 4 * threadIdx.x, threadIdx.x != 3);
  commit_copies();
  wait_for_copies<0>();
  out[threadIdx.x] = values[4 * threadIdx.x];
}

// The second round of writes does not wait until all threads have read the first.
KERNEL void writes_too_soon(float* out) {
  __shared__ float values[64];
  for (int round = 0; round < 2; ++round) {
    values[threadIdx.x] = float(round * 64 + threadIdx.x);
    __syncthreads();
    out[threadIdx.x] += values[(threadIdx.x + 32) % 64];
  }
}

// Copies to memory that a neighbour may still read.
KERNEL void copies_too_soon(const float* from, float* out) {
  DYNAMIC_SHARED(float, values);
  for (int round = 0; round < 2; ++round) {
    copy_async(values + 4 * threadIdx.x, from + 256 * round + 4 * threadIdx.x, true);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    if (round == 0) out[threadIdx.x] = values[4 * ((threadIdx.x + 32) % 64)];
  }
}

KERNEL void beyond_global(float* out, int count) { out[count - threadIdx.x] = 1; }

KERNEL void beyond_dynamic(float* out) {
  DYNAMIC_SHARED(float, values);
  values[threadIdx.x + 1] = 1;
  out[threadIdx.x] = values[threadIdx.x];
}

KERNEL void beyond_static(float* out) {
  __shared__ float values[32];
  values[threadIdx.x + blockDim.x / 2] = 1;
  out[threadIdx.x] = values[threadIdx.x % 32];
}

KERNEL void misaligned(const float* from, float* out) {
  out[threadIdx.x] = __ldg(reinterpret_cast<const float4*>(from + 1)).x;
}

// One product of each kind: a [16][k], b [8][k] (its columns), out [16][8].
KERNEL void one_product(const __half* a, const __half* b, float* out) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  auto pair = [&](const __half* of, int row, int k) { return *reinterpret_cast<const uint32_t*>(of + row * 16 + k + 2 * t); };
  const uint32_t left[4] = {pair(a, g, 0), pair(a, g + 8, 0), pair(a, g, 8), pair(a, g + 8, 8)};
  float sum[4] = {0, 0, 0, 0};
  mma_16x8x16(sum, left, pair(b, g, 0), pair(b, g, 8), __half());
  for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

KERNEL void one_integer_product(const int8_t* a, const int8_t* b, int* out) {
  DYNAMIC_SHARED(unsigned char, rows);  // [16 + 8][32], through ldmatrix
  for (int i = threadIdx.x; i < 16 * 32; i += 32) rows[i] = a[i];
  for (int i = threadIdx.x; i < 8 * 32; i += 32) rows[16 * 32 + i] = b[i];
  __syncwarp();
  const int g = threadIdx.x / 4, t = threadIdx.x % 4, lane = threadIdx.x;
  uint32_t left[4], right[4];
  load_matrices(left, rows + lane % 16 * 32 + lane / 16 * 16);
  load_matrices(right, rows + 16 * 32 + lane % 8 * 32 + lane / 8 % 2 * 16);
  int sum[4] = {0, 0, 0, 0};
  mma_16x8x32(sum, left, right[0], right[1]);
  for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}
