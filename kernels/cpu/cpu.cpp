// What the library reports about the CPU and its memory, and requests from the system.

#include <atomic>
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

// In parallel.cpp.
extern "C" __attribute__((visibility("hidden"))) void qcli_parallel(
    void (*body)(void*, int64_t, int64_t), void* context, int64_t count, int64_t grain, int threads);

#define QCLI_EXPORT extern "C" __attribute__((visibility("default")))

// The variants of this library that this CPU supports, the best last. __builtin_cpu_supports asks CPUID, and XGETBV whether the
// system saves the registers.

QCLI_EXPORT const char* qcli_variants() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  __get_cpuid(1, &eax, &ebx, &ecx, &edx);
  const bool f16c = ecx >> 29 & 1;  // __builtin_cpu_supports of older compilers lacks it
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512vnni")) return "generic avx2 avx512 avx512vnni";
  if (avx512) return "generic avx2 avx512";
  if (avx2) return "generic avx2";
#endif
  return "generic";
}

// Whether the CPU has instructions for products of bfloat16.
QCLI_EXPORT int qcli_native_bfloat16() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16");
#else
  return 0;
#endif
}

// Reads `count` pieces of 64 KiB as fast as `threads` threads can, from four places of a piece at a time. Returns a sum of what it
// read, so that nothing is left out.
QCLI_EXPORT uint64_t qcli_read(const void* const* starts, int64_t count, int threads) {
  constexpr int64_t kPiece = 1 << 16, kStreams = 4, kEach = kPiece / kStreams / 8;
  struct Reading {
    const void* const* starts;
    std::atomic<uint64_t> sum{0};
  } reading;
  reading.starts = starts;
  const auto read = [](void* context, int64_t first, int64_t last) {
    Reading& all = *static_cast<Reading*>(context);
    uint64_t sums[8] = {};
    for (int64_t piece = first; piece < last; piece++) {
      const uint64_t* from = static_cast<const uint64_t*>(all.starts[piece]);
      for (int64_t i = 0; i < kEach; i += 8) {
        for (int64_t stream = 0; stream < kStreams; stream++) {
          const uint64_t* line = from + stream * kEach + i;
          __builtin_prefetch(line + 128);
          for (int j = 0; j < 8; j++) sums[j] += line[j];
        }
      }
    }
    for (int j = 0; j < 8; j++) all.sum += sums[j];
  };
  qcli_parallel(read, &reading, count, 16, threads);
  return reading.sum;
}

// Requests pages of 2 MB where whole ones fit into new memory. Writing to it then causes one page fault instead of 512.
QCLI_EXPORT void qcli_prefer_huge_pages(void* start, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t from = reinterpret_cast<uintptr_t>(start);
  const uintptr_t first = (from + kHuge - 1) / kHuge * kHuge, last = (from + uintptr_t(bytes)) / kHuge * kHuge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)start;
  (void)bytes;
#endif
}
