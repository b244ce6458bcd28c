// How a box samples a grid: arithmetic of RoIAlign that the kernels of roi_align_3d and pyramid_roi_align share. One
// axis at a time: bilinear weights are separable. Coordinates stay floating point until they are known to lie on the
// grid, so a box may hold anything. The order of operations is the reference's (evad_kernels/_boxes.py): whether a
// sample lies outside is decided alike everywhere.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"
#include "roi_taps.h"

namespace evad {

// Sampling options, the same for all boxes of a call.
struct RoiSampling {
  int64_t oh, ow;   // bins
  int64_t sampling_ratio;  // of a bin, along each side
  bool aligned;
};

// Boxes as the callers pass them: corners [R, frames, 4] float or double, contiguous; batch [R], or null: row r is of
// image r / (R / B).
struct RoiBoxes {
  const void* corners;
  bool is_double;
  const int64_t* batch;
  int64_t R, frames;  // frames is 1 unless the boxes are tubes
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
EVAD_HOST_DEVICE Box sample_coordinate(BoxSide<Box> side, int64_t bin, int64_t sample, int64_t sampling_ratio) {
  return side.low + static_cast<Box>(bin) * side.bin +
         (static_cast<Box>(sample) + Box(0.5)) * side.bin / static_cast<Box>(sampling_ratio);
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

// At most, of a bin along an axis of `size` cells.
EVAD_HOST_DEVICE int64_t taps_of_bin(int64_t sampling_ratio, int64_t size) {
  return 2 * sampling_ratio < size ? 2 * sampling_ratio : size;
}

// Fills begin [bins + 1] and tap [bins * taps_of_bin] with what all bins of one side of a box touch. A bin's first taps
// may be cells that the bin before it met last, or last but one, as all are that it shares where samples ascend; any
// other cell is met again, with a new ordinal. So who goes through taps in order keeps what belongs to two ordinals.
// Returns the number of ordinals.
template <class F, class Box>
EVAD_HOST_DEVICE int32_t fill_taps(BoxSide<Box> side, int64_t bins, int64_t sampling_ratio, int64_t size, int32_t* begin,
                                   RoiTap<F>* tap) {
  int32_t count = 0, ordinals = 0, previous = 0;
  begin[0] = 0;
  for (int64_t bin = 0; bin < bins; ++bin) {
    const int32_t first = count, before = ordinals;
    // Samples of a bin ascend, so a cell that was met is among the last two.
    const auto add = [&](int64_t cell, Box weight) {
      if (!(weight > 0)) return;
      for (int32_t i = count; i-- > (first > count - 2 ? first : count - 2);)
        if (tap[i].cell == cell) {
          tap[i].weight += static_cast<F>(weight);
          return;
        }
      int32_t ordinal = -1;
      for (int32_t i = previous; i < first && ordinals == before; ++i)
        if (tap[i].cell == cell && tap[i].ordinal >= before - 2) ordinal = tap[i].ordinal;
      tap[count++] = {static_cast<int32_t>(cell), ordinal < 0 ? ordinals++ : ordinal, static_cast<F>(weight)};
    };
    for (int64_t i = 0; i < sampling_ratio; ++i) {
      int64_t cell = 0;
      Box next = 0;
      if (!bilinear(sample_coordinate(side, bin, i, sampling_ratio), size, cell, next)) continue;
      add(cell, 1 - next);
      add(cell + 1, next);
    }
    for (int32_t i = first; i < count; ++i) tap[i].weight /= static_cast<F>(sampling_ratio);
    begin[bin + 1] = count;
    previous = first;
  }
  return ordinals;
}

EVAD_HOST_DEVICE int32_t fill_no_taps(int64_t bins, int32_t* begin) {
  for (int64_t bin = 0; bin <= bins; ++bin) begin[bin] = 0;
  return 0;
}

// Whether a bin takes the place of the largest before it. A NaN is larger than any number, of equals the first stays.
template <class F>
EVAD_HOST_DEVICE bool is_larger(F bin, F largest) {
  return largest == largest && !(bin <= largest);
}
template <class F>
EVAD_HOST_DEVICE F larger(F bin, F largest) {
  return is_larger(bin, largest) ? bin : largest;
}
#if defined(__CUDA_ARCH__)
template <>
EVAD_HOST_DEVICE float larger(float bin, float largest) {  // one instruction
  float value;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(value) : "f"(bin), "f"(largest));
  return value;
}
#endif

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
