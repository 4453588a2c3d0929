// Threads. torch's CPU builds contain libgomp or libomp, and this library uses its pool: a second pool would spin against it.
// The caller finds GOMP_parallel in the process and passes its address. Without it, threads are started for each call.
//
// A program (program.cpp) has hundreds of products per token, some of which take microseconds. Its threads therefore stay together
// for a whole token, as a team. The calling thread runs the program and offers pieces of each product; the others take what they
// can. A thread that the system delays has taken nothing, so nobody waits for it.

#include <atomic>
#include <cstdint>
#include <thread>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<Parallel> openmp{nullptr};

// Runs body(context) in `threads` threads, one of which is the calling thread.
void in_threads(void (*body)(void*), void* context, int threads) {
  if (Parallel parallel = openmp) {
    parallel(body, context, static_cast<unsigned>(threads), 0);
    return;
  }
  constexpr int kMost = 64;
  std::thread others[kMost];
  const int started = threads - 1 < kMost ? threads - 1 : kMost;
  for (int i = 0; i < started; i++) others[i] = std::thread(body, context);
  body(context);
  for (int i = 0; i < started; i++) others[i].join();
}

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

// Waits a little longer at each call: some 20 microseconds in the loop of a processor, then by giving the processor away.
class Waiting {
 public:
  void once() {
    if (turns_++ < 500) {
#if defined(__x86_64__)
      _mm_pause();
#endif
    } else {
      std::this_thread::yield();
    }
  }

 private:
  int turns_ = 0;
};

class Team {
 public:
  Team(void (*lead)(void*), void* context) : lead_(lead), context_(context) {}

  // What each thread of a team does. The first one leads.
  static void join(void* argument) {
    Team& team = *static_cast<Team*>(argument);
    if (team.led_.exchange(true)) {
      team.help();
    } else {
      current = &team;
      team.lead_(team.context_);
      current = nullptr;
      team.over_.store(true, std::memory_order_release);
    }
  }

  // By the leader: the pieces of one loop, until all are done.
  void run(void (*body)(void*, int64_t, int64_t), void* context, int64_t count, int64_t grain) {
    const int64_t least = (count + kMostPieces - 1) / kMostPieces;
    if (grain < least) grain = least;
    const int64_t pieces = (count + grain - 1) / grain;
    body_ = body, body_context_ = context, count_ = count, grain_ = grain;
    done_.store(0, std::memory_order_relaxed);
    generation_++;
    open_.store(generation_ * (kMostPieces + 1) + uint64_t(pieces), std::memory_order_release);
    while (take()) {
    }
    for (Waiting waiting; done_.load(std::memory_order_acquire) < pieces;) waiting.once();
  }

  static thread_local Team* current;  // the team that the calling thread leads

 private:
  static constexpr uint64_t kMostPieces = 0xffff;

  void help() {
    Waiting waiting;
    while (!over_.load(std::memory_order_acquire)) {
      if (take()) {
        waiting = Waiting();
      } else {
        waiting.once();
      }
    }
  }

  // Takes a piece and runs it. What belongs to a loop is read after a piece of it was taken: it changes when all are done.
  bool take() {
    uint64_t seen = open_.load(std::memory_order_acquire);
    while (seen & kMostPieces) {
      if (!open_.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      const int64_t pieces = (count_ + grain_ - 1) / grain_, begin = (pieces - int64_t(seen & kMostPieces)) * grain_;
      body_(body_context_, begin, begin + grain_ < count_ ? begin + grain_ : count_);
      done_.fetch_add(1, std::memory_order_release);
      return true;
    }
    return false;
  }

  void (*lead_)(void*);
  void* context_;
  std::atomic<bool> led_{false}, over_{false};
  alignas(64) std::atomic<uint64_t> open_{0};  // the loop's number, and in the low 16 bits how many of its pieces nobody has taken
  alignas(64) std::atomic<int64_t> done_{0};
  void (*body_)(void*, int64_t, int64_t) = nullptr;
  void* body_context_ = nullptr;
  int64_t count_ = 0, grain_ = 1;
  uint64_t generation_ = 0;
};

thread_local Team* Team::current = nullptr;

}  // namespace

extern "C" __attribute__((visibility("default"))) void qcli_use_openmp(void* gomp_parallel) {
  openmp = reinterpret_cast<Parallel>(gomp_parallel);
}

// Calls lead(context) in the calling thread or another one, with a team of `threads` threads for every qcli_parallel within.
extern "C" __attribute__((visibility("hidden"))) void qcli_with_team(void (*lead)(void*), void* context, int threads) {
  if (threads <= 1) {
    lead(context);
    return;
  }
  Team team(lead, context);
  in_threads(Team::join, &team, threads);
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
  if (Team* team = Team::current) {
    team->run(body, context, count, grain);
    return;
  }
  Work work{body, context, count, grain};
  in_threads(take_pieces, &work, threads);
}
