// The inner loops of RoI sampling for one instruction set, over the channels of one box in one frame. roi_align_3d.cpp
// and pyramid_roi_align.cpp cut the work; F is float or double. Files that are compiled with wide instructions include
// this and no standard template.
#pragma once

#include <cstdint>

#include "roi_taps.h"

namespace evad {

// Of one axis of a box: bin p has taps begin[p] to begin[p + 1].
template <class F>
struct RoiAxis {
  const int32_t* begin;
  const RoiTap<F>* tap;
  const int32_t* cell;  // `cells` different ones, in the order in which the taps come to them
  int32_t cells;
};
template <class F>
struct RoiBox {
  RoiAxis<F> rows, columns;
};

// Of all boxes of a call.
struct RoiShape {
  int64_t oh, ow;
  int64_t Gw;     // cells in a row of the grid
  int64_t cells;  // at most, of an axis of a box
};

// Work memory, in elements of F, for `count` channels.
inline int64_t roi_workspace(const RoiShape& shape, int64_t count) { return shape.cells * shape.ow * count; }

// cell[y * Gw + x] points to the row of features of a cell; channels [begin, begin + count) are done.
template <class F>
struct RoiKernels {
  int64_t panel;  // the number of channels that they do best at a time
  // samples[bin * count + c] = bin of the box
  void (*bins)(const RoiShape& shape, const RoiBox<F>& box, const F* const* cell, int64_t begin, int64_t count,
               F* samples, F* workspace);
  // sum[c] += largest bin; the first of equal ones goes to index[c] if that is not null. A NaN is the largest.
  void (*largest)(const RoiShape& shape, const RoiBox<F>& box, const F* const* cell, int64_t begin, int64_t count,
                  F* sum, int32_t* index, F* workspace);
  // grad_cells[(y * Gw + x) * count + c] += what arrives from grad_samples[bin * count + c]
  void (*grad_bins)(const RoiShape& shape, const RoiBox<F>& box, const F* grad_samples, int64_t count, F* grad_cells,
                    F* workspace);
  // to[column * to_stride + row] = from[row * from_stride + column]
  void (*transpose)(const F* from, int64_t from_stride, int64_t rows, int64_t columns, F* to, int64_t to_stride);
};

namespace baseline {
template <class F>
RoiKernels<F> roi_kernels();
}
namespace avx2 {
template <class F>
RoiKernels<F> roi_kernels();
}
namespace avx512 {
template <class F>
RoiKernels<F> roi_kernels();
}

}  // namespace evad
