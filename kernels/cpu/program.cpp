// A program: a list of ops that is run for every token of a text, without Python between them. See qcli/runtime/program.py.

#include <cstdint>

// In parallel.cpp.
extern "C" __attribute__((visibility("hidden"))) void qcli_with_team(void (*lead)(void*), void* context, int threads);

namespace {

// See QCLI_STEP in common.h.
struct Op {
  void (*kernel)(const void* record, int64_t tokens, int64_t start, int threads);
  const void* record;
};

struct Run {
  const Op* ops;
  int64_t count, tokens, start;
  int threads;
};

void run(void* argument) {
  const Run& a = *static_cast<const Run*>(argument);
  for (int64_t i = 0; i < a.count; i++) a.ops[i].kernel(a.ops[i].record, a.tokens, a.start, a.threads);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void qcli_run(
    const void* ops, int64_t count, int64_t tokens, int64_t start, int threads) {
  Run all{static_cast<const Op*>(ops), count, tokens, start, threads};
  qcli_with_team(run, &all, threads);
}
