// Which variants this library holds and this CPU runs, the best last. __builtin_cpu_supports asks CPUID, and XGETBV whether
// the system saves the registers.

extern "C" __attribute__((visibility("default"))) const char* qcli_variants() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512vnni")) return "generic avx2 avx512 avx512vnni";
  if (avx512) return "generic avx2 avx512";
  if (avx2) return "generic avx2";
#endif
  return "generic";
}

// Whether products of bfloat16 have instructions of their own.
extern "C" __attribute__((visibility("default"))) int qcli_native_bfloat16() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16");
#else
  return 0;
#endif
}
