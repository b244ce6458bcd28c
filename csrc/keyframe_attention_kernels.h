// The kernels of keyframe attention for one instruction set, behind plain structs: keyframe_attention.cpp cuts the work
// into tasks and picks the table. Files that are compiled with wide instructions include this and no standard template.
#pragma once

#include <cstddef>
#include <cstdint>

#include "host_device.h"

namespace evad {

// Rows [row_begin, row_end) of one head: their output, log-sum-exp and share of the column sum. The whole row of logits
// is in the workspace at once, a block of rows at a time; the [N, N] map never is.
struct AttentionForwardTask {
  const void *query, *key, *value;                     // of this head: [N, D], rows contiguous
  int64_t query_stride, key_stride, value_stride;      // elements between rows
  int64_t N, D, num_keyframe, row_begin, row_end;
  double scale, keyframe_weight;
  void* output;                                        // [N, D]: row 0 of this head
  int64_t output_stride;
  void* lse;                                           // [N] float (double for float64): log-sum-exp of scaled logits
  double* column_sum;                                  // [N - num_keyframe], of this task: sum_i w_i P_ij; or null
  bool same_head;                                      // the workspace holds this head's packed keys and values
};

// The gradient of one head. Row r of the R that take part is token row[r]; its output gradient is row slot[r] of
// grad_output, or zero where slot[r] is -1. Rows of grad_query that do not take part become zero.
struct AttentionBackwardTask {
  const void *query, *key, *value;
  int64_t query_stride, key_stride, value_stride;
  int64_t N, D, num_keyframe;
  double scale, keyframe_weight;
  const int32_t *row, *slot;                           // [R]
  int64_t R;
  const void* grad_output;                             // rows contiguous; null: zero
  int64_t grad_output_stride;
  const void* lse;                                     // [N]
  const void* grad_importance;                         // [N - num_keyframe] float (double for float64), or null: zero
  double importance_scale;                             // 1 / (N * H)
  void *grad_query, *grad_key, *grad_value;            // [N, D]
  int64_t grad_query_stride, grad_key_stride, grad_value_stride;
};

// One entry a (instruction set, dtype). A workspace is one thread's: 64-byte aligned, kept from task to task.
struct AttentionKernels {
  size_t (*forward_workspace)(int64_t N, int64_t D);
  void (*forward)(const AttentionForwardTask& task, char* workspace);
  size_t (*backward_workspace)(int64_t N, int64_t D);
  void (*backward)(const AttentionBackwardTask& task, char* workspace);
};

// Null where an instruction set has nothing of its own for a dtype (or a width D): the next lower one serves.
namespace baseline {
const AttentionKernels* attention_kernels(DType dtype, int64_t D);
}
namespace avx2 {
const AttentionKernels* attention_kernels(DType dtype, int64_t D);
}
namespace avx512 {
const AttentionKernels* attention_kernels(DType dtype, int64_t D);
}
namespace amx {
const AttentionKernels* attention_kernels(DType dtype, int64_t D);
}

}  // namespace evad
