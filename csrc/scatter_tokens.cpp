// One task a run of rows to copy, or of rows to sum.
#include "scatter_tokens.h"

#include <algorithm>

#include "copy_rows.h"
#include "parallel.h"

namespace evad {
namespace {

constexpr int64_t kChannels = 64;
constexpr int64_t kSumsPerThread = 262144;  // some 100 us: less is not worth waking the threads once more

// sum[c] = the sum over i in [0, count) of channel begin + c of row first + i*step, where that cell was dropped.
template <class T>
void sum_dropped(const T* grad_dense, const int32_t* slot, int64_t first, int64_t step, int64_t count, int64_t C,
                 int64_t begin, int64_t channels, double (&sum)[kChannels]) {
  std::fill(sum, sum + kChannels, 0.0);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = first + i * step;
    if (slot[row] != kDropped) continue;
    const T* const in = grad_dense + row * C + begin;
    for (int64_t c = 0; c < channels; ++c) sum[c] += to_float(in[c]);
  }
}

}  // namespace

void scatter_tokens_forward(const ScatterRows& source, int64_t B, char* dense, int threads) {
  copy_rows(source, B, source.cells, source.row_bytes, dense, threads);
}

void scatter_tokens_backward(const ScatterGradRows& source, int64_t B, int64_t K, char* grad_tokens, int threads) {
  copy_rows(source, B, K, source.row_bytes, grad_tokens, threads);
}

template <class T>
void scatter_tokens_backward_fill(const T* grad_dense, const int32_t* slot, bool fill_per_cell, int64_t B,
                                  int64_t cells, int64_t C, T* grad_fill, double* partial, int threads) {
  const auto round = [](double sum) { return from_float<T>(static_cast<accumulate_t<T>>(sum)); };
  const int64_t runs = fill_runs(B, cells);
  parallel_for(fill_per_cell ? cells : runs, threads, [&](int64_t row) {
    const int64_t first = fill_per_cell ? row : row * kFillRun;
    const int64_t count = fill_per_cell ? B : std::min(kFillRun, B * cells - first);
    double sum[kChannels];
    for (int64_t begin = 0; begin < C; begin += kChannels) {
      const int64_t channels = std::min(kChannels, C - begin);
      sum_dropped(grad_dense, slot, first, fill_per_cell ? cells : 1, count, C, begin, channels, sum);
      if (fill_per_cell)
        std::transform(sum, sum + channels, grad_fill + row * C + begin, round);
      else
        std::copy(sum, sum + channels, partial + row * C + begin);
    }
  });
  if (fill_per_cell) return;
  parallel_for(
      (C + kChannels - 1) / kChannels, threads,
      [&](int64_t block) {
        const int64_t begin = block * kChannels, channels = std::min(kChannels, C - begin);
        double sum[kChannels] = {};
        for (int64_t run = 0; run < runs; ++run)
          for (int64_t c = 0; c < channels; ++c) sum[c] += partial[run * C + begin + c];
        std::transform(sum, sum + channels, grad_fill + begin, round);
      },
      kSumsPerThread / (runs * kChannels + 1));
}

#define EVAD_INSTANTIATE(T)                                                                                    \
  template void scatter_tokens_backward_fill<T>(const T*, const int32_t*, bool, int64_t, int64_t, int64_t, T*, \
                                                double*, int);
EVAD_FOR_EVERY_DTYPE(EVAD_INSTANTIATE)
#undef EVAD_INSTANTIATE

}  // namespace evad
