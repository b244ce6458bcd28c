// scatter_tokens: kept tokens at their cells, a fill everywhere else. Copies only, so results are bit-exact.
#pragma once

#include <cstdint>

#include "cell_map.h"
#include "host_device.h"

namespace evad {

// Forward, row = cell (copy_rows.h).
//   tokens [B, K, C], rows contiguous, strides in bytes    slot [B, cells] (cell_map.h)
//   fill null for zeros, else a row of row_bytes, or (fill_per_cell) one for each cell
struct ScatterRows {
  const char* tokens;
  int64_t stride_b, stride_k;
  const int32_t* slot;
  const char* fill;
  bool fill_per_cell;
  int64_t cells, row_bytes;

  EVAD_HOST_DEVICE const char* operator()(int64_t b, int64_t cell) const {
    const int32_t k = slot[b * cells + cell];
    if (k != kDropped) return tokens + b * stride_b + k * stride_k;
    return fill && fill_per_cell ? fill + cell * row_bytes : fill;
  }
};

// Backward, row = token: the gradient of its cell, or zeros where a later token took the cell (or there is none).
//   grad_dense [B, cells, C], contiguous    position [B, K], strides in elements
struct ScatterGradRows {
  const char* grad_dense;
  const int64_t* position;
  int64_t stride_b, stride_k;
  const int32_t* slot;
  int64_t cells, row_bytes;

  EVAD_HOST_DEVICE const char* operator()(int64_t b, int64_t k) const {
    const int64_t cell = position[b * stride_b + k * stride_k];
    if (cell < 0 || cell >= cells || slot[b * cells + cell] != k) return nullptr;
    return grad_dense + (b * cells + cell) * row_bytes;
  }
};

// Each runs on CPU threads, or on a CUDA stream (csrc/scatter_tokens.cu).
// dense [B, cells, C], contiguous.
void scatter_tokens_forward(const ScatterRows& source, int64_t B, char* dense, int threads);
void scatter_tokens_forward(const ScatterRows& source, int64_t B, char* dense, Stream stream);

// grad_tokens [B, K, C], contiguous.
void scatter_tokens_backward(const ScatterGradRows& source, int64_t B, int64_t K, char* grad_tokens, int threads);
void scatter_tokens_backward(const ScatterGradRows& source, int64_t B, int64_t K, char* grad_tokens, Stream stream);

// grad_fill[f, c] = the sum of grad_dense[b, cell, c] over the dropped (b, cell) that show fill row f, in double:
// within runs of kFillRun cells, then over runs, so the order is one for all devices and numbers of threads.
//   partial [fill_runs(B, cells), C], used where the fill is one row
constexpr int64_t kFillRun = 64;
inline int64_t fill_runs(int64_t B, int64_t cells) { return (B * cells + kFillRun - 1) / kFillRun; }

template <class T>
void scatter_tokens_backward_fill(const T* grad_dense, const int32_t* slot, bool fill_per_cell, int64_t B,
                                  int64_t cells, int64_t C, T* grad_fill, double* partial, int threads);
template <class T>
void scatter_tokens_backward_fill(const T* grad_dense, const int32_t* slot, bool fill_per_cell, int64_t B,
                                  int64_t cells, int64_t C, T* grad_fill, double* partial, Stream stream);

}  // namespace evad
