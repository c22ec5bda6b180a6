// The only file with OpenMP.  The runtime is torch's own (imported first), so one pool serves both
// and `torch.set_num_threads` governs it.
#pragma once

#include <cstdint>

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

}  // namespace llmkern
