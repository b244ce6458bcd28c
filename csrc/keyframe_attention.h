// keyframe_attention: softmax attention that also gives each non-keyframe token's importance (EVAD, Eq. 1).
//   P = softmax(scale Q K^T)    output = P V    importance[j] = c sum_h sum_i w_i P_ij,  c = 1 / (N H)
#pragma once

#include <cstdint>

#include "host_device.h"

namespace evad {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// w_i: how much query row i counts in the importance.
template <class C>
EVAD_HOST_DEVICE C row_weight(int64_t i, int64_t num_keyframe, C keyframe_weight) {
  return i < num_keyframe ? keyframe_weight : C(1);
}

// 2^r for |r| <= 1/2, relative error 1.9e-9: minimax of degree 6. V is a scalar or a vector type.
template <class V>
EVAD_HOST_DEVICE V exp2_polynomial(V r, float) {
  return 1.0000000005541663f +
         r * (0.69314720573726862f +
              r * (0.24022646890634677f +
                   r * (0.055503287769636304f +
                        r * (0.0096184889570410277f + r * (0.0013399931219698897f + r * 0.00015345812024200356f)))));
}

// The same, relative error 4e-18: the Taylor polynomial of degree 13.
template <class V>
EVAD_HOST_DEVICE V exp2_polynomial(V r, double) {
  constexpr double kCoefficients[] = {1.0,
                                      0.69314718055994531,
                                      0.24022650695910072,
                                      0.055504108664821580,
                                      0.0096181291076284772,
                                      0.0013333558146428443,
                                      0.00015403530393381609,
                                      1.5252733804059841e-05,
                                      1.3215486790144309e-06,
                                      1.0178086009239699e-07,
                                      7.0549116208011233e-09,
                                      4.4455382718708116e-10,
                                      2.5678435993488206e-11,
                                      1.3691488853904129e-12};
  V sum = r * kCoefficients[13];
  for (int i = 12; i > 0; --i) sum = (sum + kCoefficients[i]) * r;
  return sum + kCoefficients[0];
}

// What arrives at P_ij: through the output (dO_i . V_j) and through the importance (c w_i g_j).
template <class V, class C>
EVAD_HOST_DEVICE V grad_probability(V grad_output_dot_value, V grad_importance, C scaled_weight) {
  return grad_output_dot_value + scaled_weight * grad_importance;
}

// What arrives at the unscaled logit; row_term = sum_j P_ij dP_ij.
template <class V, class C>
EVAD_HOST_DEVICE V grad_logit(V probability, V grad_probability, C row_term, C scale) {
  return probability * (grad_probability - row_term) * scale;
}

// [B, H, rows, D] with contiguous rows; strides in elements.
struct HeadRows {
  char* data;
  int64_t stride_b, stride_h, stride_n;
};

struct AttentionShape {
  int64_t B, H, N, D, num_keyframe;
  double scale, keyframe_weight;
  DType dtype;
};

// Reads Q, K, V and writes output once; beside that O(N D) a thread, and 8 bytes for each non-keyframe column of each
// part (a head's 288 rows).
//   lse [B, H, N], importance [B, N - num_keyframe], both float (double for float64), contiguous
void keyframe_attention_forward(const AttentionShape& shape, const HeadRows& query, const HeadRows& key,
                                const HeadRows& value, const HeadRows& output, void* lse, void* importance,
                                int threads);

// index null: every row has an output gradient. Else [B, num_select]: grad_output holds the keyframe's rows and those
// of index only. grad_importance null: rows without an output gradient are skipped.
void keyframe_attention_backward(const AttentionShape& shape, const HeadRows& query, const HeadRows& key,
                                 const HeadRows& value, const HeadRows& grad_output, const void* lse,
                                 const void* grad_importance, const int64_t* index, int64_t num_select,
                                 const HeadRows& grad_query, const HeadRows& grad_key, const HeadRows& grad_value,
                                 int threads);

// tokens [B, N, row_bytes], contiguous, becomes [B, num_keyframe + num_select, row_bytes] at the same address: the
// keyframe's rows and those of index (ascending), moved in place.
void keep_rows(char* tokens, int64_t B, int64_t N, int64_t row_bytes, int64_t num_keyframe, const int64_t* index,
               int64_t num_select, int threads);

}  // namespace evad
