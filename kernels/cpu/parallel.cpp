// Threads. torch's CPU builds contain libgomp or libomp, and this library uses its pool: a second pool would spin against it.
// The caller finds GOMP_parallel in the process and passes its address. Without it, threads are started for each call.

#include <atomic>
#include <cstdint>
#include <thread>

namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<Parallel> openmp{nullptr};

struct Work {
  void (*body)(void*, int64_t, int64_t);
  void* context;
  int64_t count, grain;
  std::atomic<int64_t> next{0};
};

// Each thread takes the next piece when it is free, so a thread that the system delays does not delay the others.
void take_pieces(void* argument) {
  Work& work = *static_cast<Work*>(argument);
  for (;;) {
    const int64_t begin = work.next.fetch_add(work.grain, std::memory_order_relaxed);
    if (begin >= work.count) return;
    const int64_t end = begin + work.grain;
    work.body(work.context, begin, end < work.count ? end : work.count);
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void qcli_use_openmp(void* gomp_parallel) {
  openmp = reinterpret_cast<Parallel>(gomp_parallel);
}

extern "C" __attribute__((visibility("hidden"))) void qcli_parallel(
    void (*body)(void*, int64_t, int64_t), void* context, int64_t count, int64_t grain, int threads) {
  if (count <= 0) return;
  const int64_t pieces = (count + grain - 1) / grain;
  if (threads > pieces) threads = static_cast<int>(pieces);
  if (threads <= 1) {
    body(context, 0, count);
    return;
  }
  Work work{body, context, count, grain};
  if (Parallel parallel = openmp) {
    parallel(take_pieces, &work, static_cast<unsigned>(threads), 0);
    return;
  }
  constexpr int kMost = 64;
  std::thread others[kMost];
  const int started = threads - 1 < kMost ? threads - 1 : kMost;
  for (int i = 0; i < started; i++) others[i] = std::thread(take_pieces, &work);
  take_pieces(&work);
  for (int i = 0; i < started; i++) others[i].join();
}
