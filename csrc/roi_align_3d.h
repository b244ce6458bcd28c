// roi_align_3d and roi_pool_3d: features of boxes straight from kept tokens, instead of a dense map. Weights
// of a box (arithmetic: roi_boxes.h) are made once for all frames and channels.
#pragma once

#include <cstdint>

#include "cell_map.h"
#include "host_device.h"
#include "roi_boxes.h"
#include "roi_taps.h"

namespace evad {

// Kept tokens on their grid. On the CPU E is float or double: halves are widened before.
template <class E>
struct TokenGrid {
  const E* tokens;  // [B, K, C], rows contiguous, strides in elements; null in a backward
  int64_t stride_b, stride_k;
  const int32_t* slot;    // [B, cells] (cell_map.h)
  const E* background;    // null for zeros, else [C] or [cells, C]; null in a backward
  bool background_per_cell;
  int64_t B, K, C, T, Gh, Gw;

  // Channels of the token at a cell (an index into one image's cells), or of the background; null for zeros.
  EVAD_HOST_DEVICE const E* row(int64_t b, int64_t cell) const {
    const int32_t k = slot[b * T * Gh * Gw + cell];
    if (k != kDropped) return tokens + b * stride_b + k * stride_k;
    return background && background_per_cell ? background + cell * C : background;
  }
};

struct RoiPixels {
  RoiSampling sampling;
  double cells_per_pixel;
};

// samples [R, C, T, oh, ow]. Reads about 14 x 14 rows of C a box and frame, from cache; writes R*C*T*oh*ow elements.
template <class T>
void roi_align_3d_forward(const TokenGrid<accumulate_t<T>>& grid, const RoiBoxes& boxes, const RoiPixels& pixels,
                          T* samples, int threads);

// pooled [R, C]; largest [R, T, C], the bin of the largest sample of every frame, as bytes if there are at most 256
// bins; null where no gradient is wanted.
template <class T>
void roi_pool_3d_forward(const TokenGrid<accumulate_t<T>>& grid, const RoiBoxes& boxes, const RoiPixels& pixels,
                         T* pooled, void* largest, int threads);

// grad_tokens [B, K, C], zeros before; grad_background [C] or [cells, C] by grid.background_per_cell, or null. grad is
// grad_samples [R, C, T, oh, ow], or, where largest is not null, grad_pooled [R, C].
template <class T>
void roi_3d_backward(const TokenGrid<accumulate_t<T>>& grid, const RoiBoxes& boxes, const RoiPixels& pixels,
                     const T* grad, const void* largest, T* grad_tokens, T* grad_background, int threads);

// roi_pool_3d on a GPU (csrc/roi_align_3d.cu).

// Rows of boxes by image: of image b they are order[begin[b]] to order[begin[b + 1]]; null: b * R/B to (b + 1) * R/B.
struct RoiRows {
  const int64_t* order;
  const int64_t* begin;
};

// Bytes of work memory for a call; grad_background: for a backward that gives one.
template <class T>
int64_t roi_pool_3d_work(const TokenGrid<T>& grid, const RoiBoxes& boxes, const RoiSampling& sampling,
                         bool grad_background);

// As above, but a box that is in no range of `rows` is left out, and tokens are not widened.
template <class T>
void roi_pool_3d_forward(const TokenGrid<T>& grid, const RoiBoxes& boxes, const RoiRows& rows, const RoiPixels& pixels,
                         T* pooled, void* largest, void* work, Stream stream);
template <class T>
void roi_pool_3d_backward(const TokenGrid<T>& grid, const RoiBoxes& boxes, const RoiRows& rows, const RoiPixels& pixels,
                          const T* grad_pooled, const void* largest, T* grad_tokens, T* grad_background, void* work,
                          Stream stream);

}  // namespace evad
