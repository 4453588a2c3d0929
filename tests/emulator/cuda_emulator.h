// Runs a CUDA kernel on the CPU, thread by thread. common.cuh includes this file instead of the CUDA runtime's part, so g++
// compiles the same .cu file.
//
// A block is a set of fibers, one per thread, each with its own stack. A fiber runs until it waits: at __syncthreads, or in a
// collective of its warp (shuffles, votes, tensor-core products). It continues when all threads of the block, or lanes of the warp,
// have arrived. Blocks run one after the other. `order` decides which thread runs next. If the result depends on it, a barrier is
// missing:
//   forward   the threads in turn, so warps stay side by side; cp.async copies when it is waited for, as late as possible
//   reverse   each warp, last first, runs until it waits for another, as far ahead as possible; cp.async copies at once
//   shuffled  the same in a shuffled order, with late copies
// Errors are: a barrier that some threads of the block, or of the warp, never reach or reach from another line; arguments of
// another size than the kernel's; partial warps. Shared memory is filled with 0xFF before each block. When this is built with
// AddressSanitizer and UBSan, they check every access.
//
// Not supported: wgmma, TMA, clusters, cooperative groups, and the order of float atomics.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#ifndef __x86_64__
#error "the emulator switches stacks in x86-64 assembly"
#endif

#undef __shared__
#define __shared__ static __attribute__((section("emulated_shared")))
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#define KERNEL extern "C" __attribute__((noinline))
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(emulator::block->dynamic_shared)

// Bounds of the section of all static shared memory. A kernel without static shared memory has no such section.
extern "C" char __start_emulated_shared[] __attribute__((weak));
extern "C" char __stop_emulated_shared[] __attribute__((weak));

namespace emulator {

// Saves the registers that the System V ABI requires a function to save, and continues on the other stack.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.local emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, . - emulator_switch
)");

constexpr int WARP = 32;
constexpr size_t STACK = 256 << 10;

// Threads wait for each other here. `generation` counts how often all of them have arrived.
struct Barrier {
  int expected = 0, arrived = 0, line = 0;
  unsigned generation = 0;
};

struct Warp {
  Barrier barrier;
  // The value of each lane in a collective. The next collective uses the other half: some lanes may not have read this one yet.
  alignas(16) unsigned char slots[2][WARP][32];
};

// A copy of sixteen bytes by cp.async that is made when a thread waits for it.
struct Copy {
  void* to;
  const void* from;  // null for zeros
  int group;
};

struct Fiber {
  uint3 thread;
  int lane, group = 0;
  Warp* warp;
  void* stack_pointer;
  bool finished = false;
  Barrier* waits = nullptr;
  unsigned since = 0;
  int line = 0;
  std::vector<Copy> copies;
};

struct Block {
  uint3 index;
  dim3 size, grid;
  Barrier barrier;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  unsigned char* dynamic_shared = nullptr;
  Fiber* current = nullptr;
  void* scheduler = nullptr;
  void (*entry)(void*) = nullptr;
  void* arguments = nullptr;
  int order = 0;
};

inline Block* block = nullptr;
inline std::string error;

__attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  if (!error.empty()) return;  // only the first error is kept
  char text[512];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof text, format, values);
  va_end(values);
  error = text;
}

inline void yield() { emulator_switch(&block->current->stack_pointer, block->scheduler); }

inline void run_fiber() {
  block->entry(block->arguments);
  block->current->finished = true;
  yield();
  abort();
}

inline void wait(Barrier& barrier, int line) {
  Fiber* self = block->current;
  if (barrier.arrived == 0) barrier.line = line;
  if (barrier.line != line) fail("threads meet at one barrier from lines %d and %d", barrier.line, line);
  self->since = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  self->waits = &barrier;
  self->line = line;
  yield();  // the last thread yields too: otherwise it would always be ahead of the others
}

// Shares `value` with the warp and returns the values of all lanes.
template <class T>
inline unsigned char (*exchange(const T& value, int line))[32] {
  static_assert(sizeof(T) <= 32, "a slot has 32 bytes");
  Fiber* self = block->current;
  Warp* warp = self->warp;
  auto slots = warp->slots[warp->barrier.generation & 1];
  memcpy(slots[self->lane], &value, sizeof value);
  wait(warp->barrier, line);
  return slots;
}

template <class T>
inline T from_lane(unsigned char (*slots)[32], int lane) {
  T value;
  memcpy(&value, slots[lane], sizeof value);
  return value;
}

inline int lane() { return block->current->lane; }

inline void whole(unsigned mask) {
  if (mask != ~0u) fail("a warp collective with mask %08x, expected all 32 lanes", mask);
}

// Which of `n` runs at turn `i`.
inline long turn(int order, long i, long n, unsigned seed) {
  if (order == 0) return i;
  if (order == 1) return n - 1 - i;
  long step = 17;  // a step without a common factor with n visits each once
  while (std::gcd(step, n) != 1) ++step;
  return (i * step + seed % n) % n;
}

inline void start(Block& b, unsigned char* stacks) {
  const int threads = int(b.fibers.size());
  b.barrier = Barrier{threads};
  for (Warp& warp : b.warps) warp.barrier = Barrier{WARP};
  for (int i = 0; i < threads; ++i) {
    Fiber fiber;
    fiber.thread = {i % b.size.x, i / b.size.x % b.size.y, i / (b.size.x * b.size.y)};
    fiber.lane = i % WARP;
    fiber.warp = &b.warps[i / WARP];
    auto top = reinterpret_cast<void**>(stacks + size_t(i + 1) * STACK);
    *--top = nullptr;  // a return address, for the stack alignment that a call would give
    *--top = reinterpret_cast<void*>(&run_fiber);
    for (int k = 0; k < 6; ++k) *--top = nullptr;
    fiber.stack_pointer = top;
    b.fibers[i] = fiber;
  }
}

inline void report_divergence(const Block& b) {
  std::string where;
  int finished = 0;
  for (size_t i = 0; i < b.fibers.size(); ++i) {
    const Fiber& fiber = b.fibers[i];
    finished += fiber.finished;
    if (!fiber.finished && (i == 0 || b.fibers[i - 1].finished || b.fibers[i - 1].line != fiber.line)) {
      where += " thread " + std::to_string(i) + " at line " + std::to_string(fiber.line) + ",";
    }
  }
  fail("divergent barrier in block (%u, %u, %u): waiting from%s and %d of %zu threads have returned", b.index.x, b.index.y,
       b.index.z, where.substr(0, 300).c_str(), finished, b.fibers.size());
}

// Runs a fiber until it waits. Returns false if it cannot run.
inline bool step(Block& b, Fiber& fiber) {
  if (fiber.finished || (fiber.waits && fiber.waits->generation == fiber.since)) return false;
  fiber.waits = nullptr;
  b.current = &fiber;
  emulator_switch(&b.scheduler, fiber.stack_pointer);
  return true;
}

inline void run(Block& b) {
  block = &b;
  const long warps = long(b.warps.size());
  unsigned seed = b.index.x * 7 + 12345;
  bool progress = true;
  while (progress && error.empty()) {
    progress = false;
    seed = seed * 1664525u + 1013904223u;
    for (long i = 0; i < warps; ++i) {
      const long warp = turn(b.order, i, warps, seed >> 8);
      bool moved = true;
      while (moved) {
        moved = false;
        for (long k = 0; k < WARP; ++k) moved |= step(b, b.fibers[warp * WARP + turn(b.order, k, WARP, seed >> 8)]);
        progress |= moved;
        if (b.order == 0) break;
      }
    }
  }
  const bool finished = std::all_of(b.fibers.begin(), b.fibers.end(), [](const Fiber& f) { return f.finished; });
  if (!finished) report_divergence(b);
  block = nullptr;
}

template <class F>
struct Arguments;
template <class... A>
struct Arguments<void(A...)> {
  // As in the packed buffer of a launch, each argument is at a multiple of its alignment.
  static std::tuple<A...> unpack(const unsigned char* bytes, size_t length) {
    size_t at = 0;
    std::tuple<A...> values{next<A>(bytes, at)...};
    if (at != length) fail("the launch packs %zu bytes of arguments, the kernel takes %zu", length, at);
    return values;
  }

 private:
  template <class T>
  static T next(const unsigned char* bytes, size_t& at) {
    at = (at + alignof(T) - 1) / alignof(T) * alignof(T);
    T value;
    memcpy(&value, bytes + at, sizeof value);
    at += sizeof value;
    return value;
  }
};

// Returns null, or the error.
template <class F>
inline const char* launch(F* kernel, const unsigned* grid, const unsigned* threads, size_t shared, const unsigned char* bytes,
                          size_t length, int order) {
  error.clear();
  Block b;
  b.grid = dim3(grid[0], grid[1], grid[2]);
  b.size = dim3(threads[0], threads[1], threads[2]);
  const long count = long(b.size.x) * b.size.y * b.size.z;
  const long blocks = long(b.grid.x) * b.grid.y * b.grid.z;
  if (count < 1 || count > 1024 || blocks < 1) fail("a grid of %ld blocks of %ld threads", blocks, count);
  if (count % WARP) fail("a block of %ld threads, expected whole warps of 32", count);
  auto arguments = Arguments<F>::unpack(bytes, length);
  if (!error.empty()) return error.c_str();
  auto call = std::make_pair(kernel, &arguments);
  b.entry = [](void* p) {
    auto& c = *static_cast<decltype(call)*>(p);
    std::apply(c.first, *c.second);
  };
  b.arguments = &call;
  b.order = order;
  b.fibers.resize(count);
  b.warps.resize(count / WARP);
  auto stacks = static_cast<unsigned char*>(aligned_alloc(4096, count * STACK));
  for (long i = 0; i < blocks && error.empty(); ++i) {
    const unsigned k = unsigned(turn(order, i, blocks, 0));
    b.index = {k % b.grid.x, k / b.grid.x % b.grid.y, k / (b.grid.x * b.grid.y)};
    // The memory has exactly this size, so a sanitizer sees an access beyond it.
    void* memory = nullptr;
    if (shared && posix_memalign(&memory, 16, shared)) abort();
    b.dynamic_shared = static_cast<unsigned char*>(memory);
    if (shared) memset(b.dynamic_shared, 0xFF, shared);
    if (__start_emulated_shared) memset(__start_emulated_shared, 0xFF, __stop_emulated_shared - __start_emulated_shared);
    start(b, stacks);
    run(b);
    free(b.dynamic_shared);
  }
  free(stacks);
  return error.empty() ? nullptr : error.c_str();
}

}  // namespace emulator

#define EMULATE(kernel)                                                                                                \
  extern "C" const char* emulate_##kernel(const unsigned* grid, const unsigned* threads, size_t shared,                \
                                          const unsigned char* bytes, size_t length, int order) {                      \
    return emulator::launch<decltype(kernel)>(kernel, grid, threads, shared, bytes, length, order);                    \
  }

#define __noinline__ __attribute__((noinline))
#define threadIdx (emulator::block->current->thread)
#define blockIdx (emulator::block->index)
#define blockDim (emulator::block->size)
#define gridDim (emulator::block->grid)

inline void __syncthreads(int line = __builtin_LINE()) { emulator::wait(emulator::block->barrier, line); }
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  emulator::whole(mask);
  emulator::wait(emulator::block->current->warp->barrier, line);
}
inline void __threadfence() {}

template <class T>
inline T __shfl_sync(unsigned mask, T value, int from, int line = __builtin_LINE()) {
  emulator::whole(mask);
  return emulator::from_lane<T>(emulator::exchange(value, line), from & 31);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int flip, int line = __builtin_LINE()) {
  emulator::whole(mask);
  return emulator::from_lane<T>(emulator::exchange(value, line), emulator::lane() ^ flip);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned distance, int line = __builtin_LINE()) {
  emulator::whole(mask);
  const int lane = emulator::lane();
  return emulator::from_lane<T>(emulator::exchange(value, line), lane < int(distance) ? lane : lane - int(distance));
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  emulator::whole(mask);
  const auto slots = emulator::exchange(predicate != 0, line);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= unsigned(emulator::from_lane<bool>(slots, i)) << i;
  return votes;
}

template <class T>
inline T __ldg(const T* from) { return *from; }
template <class T>
inline T __ldcs(const T* from) { return *from; }
template <class T>
inline void __stcs(T* to, T value) { *to = value; }

inline unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
inline float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
inline float __int_as_float(int bits) { return __uint_as_float(unsigned(bits)); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmaf_rd(float a, float b, float c) {
  fesetround(FE_DOWNWARD);
  volatile float sum = fmaf(a, b, c);
  fesetround(FE_TONEAREST);
  return sum;
}
inline int __float2int_rn(float x) { return std::isnan(x) ? 0 : x >= 2147483648.0f ? INT32_MAX : x < -2147483648.0f ? INT32_MIN : int(nearbyintf(x)); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned nibble = selector >> 4 * i & 15;
    unsigned byte = bytes >> 8 * (nibble & 7) & 0xff;
    if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << 8 * i;
  }
  return result;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class T>
inline T min(T a, T b) { return b < a ? b : a; }
template <class T>
inline T max(T a, T b) { return a < b ? b : a; }

template <class T>
inline T atomicAdd(T* at, T value) { const T old = *at; *at += value; return old; }
inline unsigned atomicOr(unsigned* at, unsigned value) { const unsigned old = *at; *at |= value; return old; }
inline unsigned atomicMax(unsigned* at, unsigned value) { const unsigned old = *at; *at = max(old, value); return old; }

// The emulator's versions of the instructions in ptx.cuh.
#include "emulated_ptx.h"
