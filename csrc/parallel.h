// Threads for CPU kernels: as many as torch is set to use, from the OpenMP pool that torch has loaded already.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

#include <cstdint>
#include <exception>
#include <memory>

namespace evad {

// body(item) for every item in [0, items), contiguous runs of items a thread. The split never changes a result: a
// kernel that sums across items does so in an order that does not depend on the number of threads.
// Up to `grain` items run on the calling thread: waking the others takes microseconds, many where cores are busy. More
// use every thread, never some of them: libgomp ends the threads that a smaller team leaves out.
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

// The same with work memory: body(item, workspace), `size` elements a thread, on pages of its own, not initialised.
template <class F, class Body>
void parallel_for_with_workspace(int64_t items, int64_t size, int threads, const Body& body) {
  const int64_t page = 4096 / static_cast<int64_t>(sizeof(F)), stride = (size + page - 1) / page * page;
  const std::unique_ptr<F[]> memory(new F[stride * (threads > 1 ? threads : 1) + page]);
  const int64_t in_page = static_cast<int64_t>(reinterpret_cast<uintptr_t>(memory.get()) / sizeof(F)) % page;
  F* const first = memory.get() + page - in_page;
  parallel_for(items, threads, [&](int64_t item) {
#if defined(_OPENMP)
    body(item, first + stride * omp_get_thread_num());
#else
    body(item, first);
#endif
  });
}

}  // namespace evad
