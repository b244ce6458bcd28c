// roi_align_3d and roi_pool_3d: features of boxes from kept tokens through a table of cell pointers (a token, a row of
// the background, or zeros) instead of a dense map. Per box (arithmetic: roi_boxes.h) the weights are made once for all
// frames and channels.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "roi_boxes.h"
#include "roi_tables.h"

namespace evad {

// Kept tokens on their grid. F is float or double: halves are widened before.
template <class F>
struct TokenGrid {
  const F* tokens;  // [B, K, C], rows contiguous, strides in elements; null in a backward
  int64_t stride_b, stride_k;
  const int32_t* slot;    // [B, cells] (cell_map.h)
  const F* background;    // null for zeros, else [C] or [cells, C]; null in a backward
  bool background_per_cell;
  int64_t B, K, C, T, Gh, Gw;
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

}  // namespace evad
