// The only file with OpenMP.  The runtime is torch's own (imported first), so one pool serves both
// and `torch.set_num_threads` governs it.  A kernel runs on one thread inside somebody's parallel region,
// and in a child made by fork: the pool's threads are not there, and the runtime would wait for them.
//
// ThreadSanitizer does not see how OpenMP's runtime makes threads wait for each other, and would report all that
// they share.  Compiled for it, each region has std::threads of its own instead: the same shares, atomics and
// barriers of ours between them, and every race of the kernels is seen (tests/proof/sanitizers.py).
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(_OPENMP) && !defined(__SANITIZE_THREAD__)
#include <omp.h>
#endif
#ifdef __linux__
#include <pthread.h>
#endif

namespace llmkern {

// Whether this process was forked from one that had loaded the kernels; watched from their loading on, since
// torch may have started the pool's threads before the first kernel runs.
inline bool forked = false;
#ifdef __linux__
inline const int watching_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

#if defined(__SANITIZE_THREAD__)
inline thread_local bool in_region = false;
inline int threads() { return forked || in_region ? 1 : 4; }
#elif defined(_OPENMP)
inline int threads() { return forked || omp_in_parallel() ? 1 : omp_get_max_threads(); }
#else
inline int threads() { return 1; }
#endif

// body(rank, size) on `workers` threads at once, or on as many of them as there are.
template <class Body>
void on_threads(int workers, const Body& body) {
#if defined(__SANITIZE_THREAD__)
  const auto work = [&](int rank) {
    in_region = true;
    body(rank, workers);
    in_region = false;
  };
  std::vector<std::thread> others;
  for (int rank = 1; rank < workers; ++rank) others.emplace_back(work, rank);
  work(0);
  for (std::thread& other : others) other.join();
#elif defined(_OPENMP)
#pragma omp parallel num_threads(workers)
  body(omp_get_thread_num(), omp_get_num_threads());
#else
  (void)workers;
  body(0, 1);
#endif
}

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// The part of n things that belongs to one of `workers`, the same whenever n is.
inline Range share_of(int64_t n, int64_t worker, int64_t workers) {
  return {n * worker / workers, n * (worker + 1) / workers};
}

// Iterations that a thread takes one by one, first from its own share, then from those of the others.  So
// a loop finds in a core's cache what it left there when it last ran, and a late thread is helped.
class Shares {
 public:
  Shares(int64_t n, int workers) : parts_(workers) {
    for (int w = 0; w < workers; ++w) {
      const auto [first, last] = share_of(n, w, workers);
      parts_[w].next = first;
      parts_[w].last = last;
    }
  }
  template <class Body>
  void run(int worker, const Body& body) {
    const int workers = static_cast<int>(parts_.size());
    for (int k = 0; k < workers; ++k) {
      Part& part = parts_[(worker + k) % workers];
      for (int64_t i; (i = part.next.fetch_add(1, std::memory_order_relaxed)) < part.last;) body(i);
    }
  }

 private:
  struct alignas(64) Part {  // a line of cache each
    std::atomic<int64_t> next;
    int64_t last;
  };
  std::vector<Part> parts_;
};

// body(i) for i in [0, n), each i on some thread; `uneven` iterations are handed out one by one.
template <class Body>
void parallel_for(int64_t n, bool uneven, const Body& body) {
  const int workers = threads();
  if (n <= 1 || workers == 1) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  Shares shares(n, workers);
  on_threads(workers, [&](int worker, int team) {
    if (uneven || team != workers) {
      shares.run(worker, body);
    } else {
      const auto [first, last] = share_of(n, worker, workers);
      for (int64_t i = first; i < last; ++i) body(i);
    }
  });
}

// What a thread knows of the others in `together`.
class Team {
 public:
  const int rank, size;

  Team(int rank, int size, std::atomic<int64_t>& arrived) : rank(rank), size(size), arrived_(arrived) {}
  Range share(int64_t n) const { return share_of(n, rank, size); }  // this thread's part of n things
  // Waits until all have come here; what they wrote before is seen behind it.
  void barrier() const {
    if (size == 1) return;
    wanted_ += size;
    arrived_.fetch_add(1, std::memory_order_acq_rel);
    for (int spins = 0; arrived_.load(std::memory_order_acquire) < wanted_; ++spins)
      if (spins > kSpins) std::this_thread::yield();  // a processor that others want, too
  }

 private:
  static constexpr int kSpins = 1 << 14;
  std::atomic<int64_t>& arrived_;
  mutable int64_t wanted_ = 0;
};

// body(team) on every thread at once, for work of many small steps: a barrier of theirs is 0.2 us, where
// beginning and ending a parallel_for is several.  An exception must not leave it.
template <class Body>
void together(const Body& body) {
  std::atomic<int64_t> arrived{0};
  const int workers = threads();
  const auto join = [&](int rank, int size) { body(Team(rank, size, arrived)); };
  if (workers > 1)
    on_threads(workers, join);
  else
    join(0, 1);
}

}  // namespace llmkern
