// scatter_tokens on a GPU. Forward and backward are copy_rows (copy_rows.cuh). The gradient of the fill reads each
// dropped row once, a thread a channel, and needs no atomics: one thread owns each sum.
#include "copy_rows.cuh"
#include "cuda_launch.cuh"
#include "scatter_tokens.h"

namespace evad {
namespace {

constexpr int kThreads = 128;
constexpr const char* kOp = "scatter_tokens";

template <class Out>
__device__ Out rounded(double sum) {
  return from_float<Out>(static_cast<accumulate_t<Out>>(sum));
}

// out[r, c] = the sum over dropped rows r*first + i*step, i in [0, count), row < rows, of channel c.
template <class T, class Out>
__global__ void __launch_bounds__(kThreads)
    sum_dropped_kernel(const T* __restrict__ grad_dense, const int32_t* __restrict__ slot, int64_t sums, int64_t first,
                       int64_t step, int64_t count, int64_t rows, int64_t C, Out* __restrict__ out) {
  for (int64_t r = blockIdx.x; r < sums; r += gridDim.x)
    for (int64_t c = blockIdx.y * static_cast<int64_t>(kThreads) + threadIdx.x; c < C;
         c += gridDim.y * static_cast<int64_t>(kThreads)) {
      double sum = 0;
      const int64_t end = min(rows, r * first + count * step);
      for (int64_t row = r * first; row < end; row += step)
        if (slot[row] == kDropped) sum += to_float(grad_dense[row * C + c]);
      out[r * C + c] = rounded<Out>(sum);
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_runs_kernel(const double* __restrict__ partial, int64_t runs, int64_t C, T* __restrict__ grad_fill) {
  for (int64_t c = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; c < C;
       c += gridDim.x * static_cast<int64_t>(kThreads)) {
    double sum = 0;
    for (int64_t run = 0; run < runs; ++run) sum += partial[run * C + c];
    grad_fill[c] = rounded<T>(sum);
  }
}

}  // namespace

void scatter_tokens_forward(const ScatterRows& source, int64_t B, char* dense, Stream stream) {
  const uint64_t alignment = address_bits(source.tokens, source.fill) | source.stride_b | source.stride_k;
  copy_rows(kOp, source, alignment, B, source.cells, source.row_bytes, dense, stream);
}

void scatter_tokens_backward(const ScatterGradRows& source, int64_t B, int64_t K, char* grad_tokens, Stream stream) {
  copy_rows(kOp, source, address_bits(source.grad_dense), B, K, source.row_bytes, grad_tokens, stream);
}

template <class T>
void scatter_tokens_backward_fill(const T* grad_dense, const int32_t* slot, bool fill_per_cell, int64_t B,
                                  int64_t cells, int64_t C, T* grad_fill, double* partial, Stream stream) {
  if (cells == 0 || C == 0) return;
  const int64_t rows = B * cells, runs = fill_runs(B, cells), columns = blocks_for(C, kThreads);
  const auto y = static_cast<unsigned>(std::min(columns, kMaxBlocksY));
  if (fill_per_cell) {
    sum_dropped_kernel<T, T><<<dim3(blocks_for(cells, 1), y), kThreads, 0, stream>>>(grad_dense, slot, cells, 1, cells,
                                                                                     B, rows, C, grad_fill);
    return check_launch(kOp);
  }
  if (runs > 0) {
    sum_dropped_kernel<T, double><<<dim3(blocks_for(runs, 1), y), kThreads, 0, stream>>>(
        grad_dense, slot, runs, kFillRun, 1, kFillRun, rows, C, partial);
    check_launch(kOp);
  }
  sum_runs_kernel<T><<<columns, kThreads, 0, stream>>>(partial, runs, C, grad_fill);
  check_launch(kOp);
}

#define EVAD_INSTANTIATE(T)                                                                                    \
  template void scatter_tokens_backward_fill<T>(const T*, const int32_t*, bool, int64_t, int64_t, int64_t, T*, \
                                                double*, Stream);
EVAD_FOR_EVERY_DTYPE(EVAD_INSTANTIATE)
#undef EVAD_INSTANTIATE

}  // namespace evad
