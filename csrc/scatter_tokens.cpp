// One task a run of cells (forward) or of tokens (backward); a row is one memcpy.
#include "scatter_tokens.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cell_map.h"
#include "parallel.h"

namespace evad {
namespace {

constexpr int64_t kRowsPerTask = 64;

int64_t tasks(int64_t rows) { return (rows + kRowsPerTask - 1) / kRowsPerTask; }

}  // namespace

void scatter_tokens_forward(const char* tokens, int64_t stride_b, int64_t stride_k, const int32_t* slot,
                            const char* fill, bool fill_per_cell, int64_t B, int64_t cells, int64_t row_bytes,
                            char* dense, int threads) {
  const int64_t rows = B * cells;
  parallel_for(tasks(rows), threads, [&](int64_t task) {
    const int64_t end = std::min(rows, (task + 1) * kRowsPerTask);
    for (int64_t row = task * kRowsPerTask; row < end; ++row) {
      const int64_t b = row / cells, cell = row % cells;
      char* out = dense + row * row_bytes;
      if (slot[row] != kDropped)
        std::memcpy(out, tokens + b * stride_b + slot[row] * stride_k, row_bytes);
      else if (fill)
        std::memcpy(out, fill + fill_offset(cell, fill_per_cell, row_bytes), row_bytes);
      else
        std::memset(out, 0, row_bytes);
    }
  });
}

void scatter_tokens_backward(const char* grad_dense, const int64_t* position, int64_t stride_b, int64_t stride_k,
                             const int32_t* slot, int64_t B, int64_t K, int64_t cells, int64_t row_bytes,
                             char* grad_tokens, int threads) {
  const int64_t rows = B * K;
  parallel_for(tasks(rows), threads, [&](int64_t task) {
    const int64_t end = std::min(rows, (task + 1) * kRowsPerTask);
    for (int64_t row = task * kRowsPerTask; row < end; ++row) {
      const int64_t b = row / K, k = row % K;
      const int64_t cell = b * cells + position[b * stride_b + k * stride_k];
      if (slot[cell] == k)
        std::memcpy(grad_tokens + row * row_bytes, grad_dense + cell * row_bytes, row_bytes);
      else
        std::memset(grad_tokens + row * row_bytes, 0, row_bytes);
    }
  });
}

template <class T>
void scatter_tokens_backward_fill(const T* grad_dense, const int32_t* slot, bool fill_per_cell, int64_t B,
                                  int64_t cells, int64_t C, T* grad_fill, int threads) {
  // One task a fill row and run of channels: the sum over (b, cell) stays in one task and in one order.
  constexpr int64_t kChannels = 64;
  const int64_t runs = (C + kChannels - 1) / kChannels;
  const int64_t fill_rows = fill_per_cell ? cells : 1;
  parallel_for(fill_rows * runs, threads, [&](int64_t task) {
    const int64_t f = task / runs, begin = task % runs * kChannels;
    const int64_t count = std::min(kChannels, C - begin);
    double sum[kChannels] = {};
    for (int64_t b = 0; b < B; ++b)
      for (int64_t cell = fill_per_cell ? f : 0; cell < (fill_per_cell ? f + 1 : cells); ++cell) {
        if (slot[b * cells + cell] != kDropped) continue;
        const T* row = grad_dense + (b * cells + cell) * C + begin;
        for (int64_t c = 0; c < count; ++c) sum[c] += to_float(row[c]);
      }
    for (int64_t c = 0; c < count; ++c)
      grad_fill[f * C + begin + c] = from_float<T>(static_cast<accumulate_t<T>>(sum[c]));
  });
}

#define EVAD_INSTANTIATE(T)                                                                                   \
  template void scatter_tokens_backward_fill<T>(const T*, const int32_t*, bool, int64_t, int64_t, int64_t, T*, \
                                                int);
EVAD_INSTANTIATE(float)
EVAD_INSTANTIATE(double)
EVAD_INSTANTIATE(float16)
EVAD_INSTANTIATE(bfloat16)
#undef EVAD_INSTANTIATE

}  // namespace evad
