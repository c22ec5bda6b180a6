// The only file with OpenMP.  The runtime is torch's own (imported first), so one pool serves both
// and `torch.set_num_threads` governs it.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace llmkern {

inline int threads() {
#ifdef _OPENMP
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

// body(i) for i in [0, n), each i on some thread; `dynamic` hands them out one by one.
template <class Body>
void parallel_for(int64_t n, bool dynamic, const Body& body) {
#ifdef _OPENMP
  if (n > 1 && threads() > 1) {
    if (dynamic) {
#pragma omp parallel for schedule(dynamic, 1)
      for (int64_t i = 0; i < n; ++i) body(i);
    } else {
#pragma omp parallel for schedule(static)
      for (int64_t i = 0; i < n; ++i) body(i);
    }
    return;
  }
#endif
  (void)dynamic;
  for (int64_t i = 0; i < n; ++i) body(i);
}

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// What a thread knows of the others in `together`.
class Team {
 public:
  const int rank, size;

  Team(int rank, int size, std::atomic<int64_t>& arrived) : rank(rank), size(size), arrived_(arrived) {}
  // This thread's part of n things, the same whenever n is.
  Range share(int64_t n) const { return {n * rank / size, n * (rank + 1) / size}; }
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
#ifdef _OPENMP
  if (threads() > 1) {
#pragma omp parallel
    body(Team(omp_get_thread_num(), omp_get_num_threads(), arrived));
    return;
  }
#endif
  body(Team(0, 1, arrived));
}

}  // namespace llmkern
