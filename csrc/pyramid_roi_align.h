// pyramid_roi_align: each box sampled on the pyramid level of its size (arithmetic: roi_boxes.h).
#pragma once

#include <cstdint>

#include "host_device.h"
#include "roi_boxes.h"
#include "roi_tables.h"

namespace evad {

// A level [B, C, h, w], any strides (in elements).
struct PyramidLevel {
  void* data;
  int64_t stride_b, stride_c, stride_h, stride_w;
  int64_t h, w;
  double pixels_per_cell;
};

struct Pyramid {
  const PyramidLevel* level;
  int64_t count, B, C;
  double canonical_size;
  int64_t canonical_level, first;  // first: number of the finest level
};

// samples [R, C, oh, ow]. Levels that are not channels-last in the type of the sums are copied so, rows that a box
// touches only: C * h * w elements read and written. Beside that about 14 x 14 rows of C a box, from cache.
template <class T>
void pyramid_roi_align_forward(const Pyramid& pyramid, const RoiBoxes& boxes, const RoiSampling& sampling,
                               T* samples, int threads);

// Levels' data is their gradient, contiguous; all of it is written.
template <class T>
void pyramid_roi_align_backward(const Pyramid& pyramid, const RoiBoxes& boxes, const RoiSampling& sampling,
                                const T* grad_samples, int threads);

}  // namespace evad
