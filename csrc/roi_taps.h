// A cell of one axis that a bin of a box touches, and how much it weighs: what kernels read of boxes. A plain struct,
// for files that are compiled with wide instructions too.
#pragma once

#include <cstdint>

namespace evad {

// 16 bytes: one load on a GPU.
template <class F>
struct alignas(16) RoiTap {
  int32_t cell;
  int32_t ordinal;  // counts the different cells of the axis as they are met
  F weight;
};

}  // namespace evad
