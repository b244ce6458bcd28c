// Rows copied from wherever a source says: what scatter_tokens and gather_tokens are, forward and backward.
// A source is a struct of pointers and sizes with `const char* operator()(int64_t b, int64_t row) const`: where row
// `row` of sample `b` lies, or null for zeros. It is EVAD_HOST_DEVICE, so CPU and GPU (copy_rows.cuh) follow the same
// formula.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "parallel.h"

namespace evad {

// body(b, begin, end) for runs of the rows of all samples, a run a task.
template <class Body>
void for_each_run(int64_t B, int64_t rows, int64_t row_bytes, int threads, const Body& body) {
  constexpr int64_t kRowsPerTask = 64;
  constexpr int64_t kBytesPerThread = 131072;  // copied in some 10 us: less is not worth waking the threads
  const int64_t runs = (rows + kRowsPerTask - 1) / kRowsPerTask;
  const auto run = [&](int64_t task) {
    const int64_t b = task / runs, begin = task % runs * kRowsPerTask;
    body(b, begin, std::min(rows, begin + kRowsPerTask));
  };
  parallel_for(B * runs, threads, run, kBytesPerThread / (kRowsPerTask * row_bytes + 1));
}

// out[b, row] = the source's row, [B, rows] of row_bytes, contiguous; every byte is written once.
template <class Source>
void copy_rows(const Source& source, int64_t B, int64_t rows, int64_t row_bytes, char* out, int threads) {
  const auto copy = [&](auto size) {
    if (row_bytes == 0) return;  // then `out` may be null, which memset must not be given
    for_each_run(B, rows, row_bytes, threads, [&](int64_t b, int64_t begin, int64_t end) {
      const Source from = source;  // local: a store through char* could change what `source` refers to
      const auto bytes = size;
      char* to = out + (b * rows + begin) * row_bytes;
      for (int64_t row = begin; row < end; ++row, to += bytes)
        if (const char* const in = from(b, row))
          std::memcpy(to, in, bytes);
        else
          std::memset(to, 0, bytes);
    });
  };
  switch (row_bytes) {  // of known size it is a load and a store: masks and positions
    case 1: return copy(std::integral_constant<size_t, 1>{});
    case 4: return copy(std::integral_constant<size_t, 4>{});
    case 8: return copy(std::integral_constant<size_t, 8>{});
    default: return copy(static_cast<size_t>(row_bytes));
  }
}

}  // namespace evad
