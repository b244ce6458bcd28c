// Threads for CPU kernels: as many as torch is set to use, from the OpenMP pool that torch has loaded already.
#pragma once

#include <cstdint>
#include <exception>

namespace evad {

// body(item) for every item in [0, items), contiguous runs of items a thread. The split never changes a result: a kernel
// that sums across items does so in an order that does not depend on the number of threads.
// Up to `grain` items run on the calling thread: waking the others takes microseconds, many where cores are busy. More use
// every thread, never some of them: libgomp ends the threads that a smaller team leaves out.
template <class Body>
void parallel_for(int64_t items, int threads, const Body& body, int64_t grain = 1) {
#if defined(_OPENMP)
  if (threads > 1 && items > 1 && items > grain) {
    std::exception_ptr failure;  // an exception that leaves a parallel region ends the process
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t item = 0; item < items; ++item) {
      try {
        body(item);
      } catch (...) {
#pragma omp critical(evad_parallel_for)
        failure = std::current_exception();
      }
    }
    if (failure) std::rethrow_exception(failure);
    return;
  }
#endif
  (void)threads;
  for (int64_t item = 0; item < items; ++item) body(item);
}

}  // namespace evad
