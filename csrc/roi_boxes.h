// How a box samples a grid: arithmetic of RoIAlign that the kernels of roi_align_3d and pyramid_roi_align share. One
// axis at a time: bilinear weights are separable. Coordinates stay floating point until they are known to lie on the
// grid, so a box may hold anything. The order of operations is the reference's (evad_kernels/_boxes.py): whether a
// sample lies outside is decided alike everywhere.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace evad {

// Sampling options, the same for all boxes of a call.
struct RoiSampling {
  int64_t oh, ow;   // bins
  int64_t samples;  // of a bin, along each side
  bool aligned;
};

// False for a reversed box and for one with a NaN: such a box samples nothing.
template <class Box>
EVAD_HOST_DEVICE bool is_box(const Box* corners) {
  return corners[2] >= corners[0] && corners[3] >= corners[1];
}

// One side of a box: where it begins, in cells, and how wide a bin is.
template <class Box>
struct BoxSide {
  Box low, bin;
};

template <class Box>
EVAD_HOST_DEVICE BoxSide<Box> box_side(Box low, Box high, Box cells_per_pixel, int64_t bins, bool aligned) {
  const Box offset = aligned ? Box(0.5) : Box(0);
  low = low * cells_per_pixel - offset;
  Box length = high * cells_per_pixel - offset - low;
  if (!aligned && length < 1) length = 1;
  return {low, length / static_cast<Box>(bins)};
}

template <class Box>
EVAD_HOST_DEVICE Box sample_coordinate(BoxSide<Box> side, int64_t bin, int64_t sample, int64_t samples) {
  return side.low + static_cast<Box>(bin) * side.bin +
         (static_cast<Box>(sample) + Box(0.5)) * side.bin / static_cast<Box>(samples);
}

// The cell before a sample and the weight of the cell after it. False for a sample that weighs nothing.
template <class Box>
EVAD_HOST_DEVICE bool bilinear(Box at, int64_t size, int64_t& cell, Box& next_weight) {
  if (!(at >= -1 && at <= static_cast<Box>(size))) return false;
  if (!(at > 0)) at = 0;
  cell = static_cast<int64_t>(at);
  if (cell < size - 1) {
    next_weight = at - static_cast<Box>(cell);
  } else {
    cell = size - 1;
    next_weight = 0;
  }
  return true;
}

// Index among `count` levels, of which the finest is number `first`, of a box; one without a level goes to the finest.
template <class Box>
EVAD_HOST_DEVICE int64_t pyramid_level(const Box* corners, Box canonical_size, int64_t canonical_level, int64_t first,
                                       int64_t count) {
  const Box size = std::sqrt((corners[2] - corners[0]) * (corners[3] - corners[1]));
  const Box fraction = size / canonical_size + Box(2.220446049250313e-16);
  const Box octave = static_cast<Box>(std::log2(static_cast<double>(fraction)));
  const Box level = std::floor(static_cast<Box>(canonical_level) + octave) - static_cast<Box>(first);
  if (!(level > 0)) return 0;
  return level < static_cast<Box>(count - 1) ? static_cast<int64_t>(level) : count - 1;
}

}  // namespace evad
