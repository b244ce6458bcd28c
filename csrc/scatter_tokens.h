// scatter_tokens: kept tokens at their cells, a fill everywhere else. Copies only, so results are bit-exact.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace evad {

// Where a row of the fill for `cell` starts: fill is [C] (per_cell false) or [cells, C].
EVAD_HOST_DEVICE int64_t fill_offset(int64_t cell, bool per_cell, int64_t C) { return per_cell ? cell * C : 0; }

// Every output byte is written once: B*cells*row_bytes, plus the same read.
//   tokens [B, K, C], rows contiguous, strides in bytes    slot [B, cells] (cell_map.h)
//   fill null for zeros, else rows of row_bytes            dense [B, cells, C], contiguous
void scatter_tokens_forward(const char* tokens, int64_t stride_b, int64_t stride_k, const int32_t* slot,
                            const char* fill, bool fill_per_cell, int64_t B, int64_t cells, int64_t row_bytes,
                            char* dense, int threads);

// grad_fill[f, c] = sum over (b, cell) that hold the fill row f of grad_dense[b, cell, c], in the order b, cell.
template <class T>
void scatter_tokens_backward_fill(const T* grad_dense, const int32_t* slot, bool fill_per_cell, int64_t B,
                                  int64_t cells, int64_t C, T* grad_fill, int threads);

// grad_tokens[b, k] = grad_dense[b, position[b, k]], or zeros where a later token took the cell.
void scatter_tokens_backward(const char* grad_dense, const int64_t* position, int64_t stride_b, int64_t stride_k,
                             const int32_t* slot, int64_t B, int64_t K, int64_t cells, int64_t row_bytes,
                             char* grad_tokens, int threads);

}  // namespace evad
