// How linear_int8.cu and linear_w8a16.cu read an int8 weight for few tokens.
//
// A block takes TILE rows at a time. Its warps divide the columns: a warp takes TURN chunks of CHUNK columns per turn. Lane (g, t)
// takes the 16 consecutive columns at 16 t of a chunk, in rows g and g + 8. Each turn is loaded one turn ahead, over all tiles of
// the block. Results of rows beyond the last are not stored; chunks beyond the last are zeros. FULL is 1 if no turn is partial.
#pragma once

#include "linear_int8.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * 32;
constexpr int TILE = 16;   // rows of an mma
constexpr int CHUNK = 64;  // columns
constexpr int TURN = 4;    // chunks
constexpr int MOST = 8;    // the tokens of an mma
constexpr int PITCH = TILE + 4;     // values per token's sums; the padding spreads a warp's sums over all banks
constexpr int SUMS = MOST * PITCH;  // per warp

struct Turns {
  const int8_t* weight;
  long long rows;
  int columns, g, t;
  const int8_t* from[2];
  uint4 next[TURN][2];

  __device__ inline void go_to(long long tile) {
#pragma unroll
    for (int r = 0; r < 2; ++r) from[r] = weight + min(tile * TILE + g + 8 * r, rows - 1) * columns + 16 * t;
  }

  // Whether the lane has columns in the chunk at `column`.
  __device__ inline bool inside(int column) const { return FULL || column + 16 * t < columns; }

  __device__ inline void load(int turn) {
#pragma unroll
    for (int c = 0; c < TURN; ++c) {
      const int column = (turn * TURN + c) * CHUNK;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        next[c][r] = inside(column) ? load_once(reinterpret_cast<const uint4*>(from[r] + column)) : make_uint4(0, 0, 0, 0);
      }
    }
  }

  // Returns the turn that was loaded, and begins to load the next one: of this tile, or the warp's first of the next tile.
  __device__ inline void take(uint4 (&words)[TURN][2], int turn, int turns, int first, long long next_tile) {
#pragma unroll
    for (int c = 0; c < TURN; ++c) {
      words[c][0] = next[c][0];
      words[c][1] = next[c][1];
    }
    const bool last = turn + WARPS >= turns;
    if (last) go_to(next_tile);
    load(last ? first : turn + WARPS);
  }
};
