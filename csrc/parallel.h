// Threads for CPU kernels: as many as torch is set to use, from the OpenMP pool that torch has loaded already.
#pragma once

#include <cstdint>

namespace evad {

// body(item) for every item in [0, items), contiguous runs of items a thread. The split never changes a result: a kernel
// that sums across items does so in an order that does not depend on the number of threads.
template <class Body>
void parallel_for(int64_t items, int threads, const Body& body) {
#if defined(_OPENMP)
  if (threads > 1 && items > 1) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t item = 0; item < items; ++item) body(item);
    return;
  }
#endif
  (void)threads;
  for (int64_t item = 0; item < items; ++item) body(item);
}

}  // namespace evad
