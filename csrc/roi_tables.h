// What the RoI ops prepare before the inner loops: weights of every box, boxes by image, the kernels of this machine.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "cpu_isa.h"
#include "parallel.h"
#include "range_check.h"
#include "roi_boxes.h"
#include "roi_kernels.h"

namespace evad {

template <class F>
RoiKernels<F> roi_kernels() {
  const Isa isa = cpu_isa();
#if defined(EVAD_AVX512)
  if (isa >= Isa::avx512) return avx512::roi_kernels<F>();
#endif
#if defined(EVAD_AVX2)
  if (isa >= Isa::avx2) return avx2::roi_kernels<F>();
#endif
  (void)isa;
  return baseline::roi_kernels<F>();
}

// `row_taps`, `column_taps`: at most, of one bin.
inline RoiShape roi_shape(const RoiSampling& sampling, int64_t Gw, int64_t row_taps, int64_t column_taps) {
  return {sampling.oh, sampling.ow, Gw, std::max(sampling.oh * row_taps, sampling.ow * column_taps)};
}

// Rows of boxes by image: of image b they are order[begin[b]] to order[begin[b + 1]], ascending.
struct BoxesByImage {
  std::vector<int64_t> begin, order;

  // Only after require_batch.
  BoxesByImage(const RoiBoxes& boxes, int64_t B) : begin(B + 1), order(boxes.R) {
    for (int64_t r = 0; r < boxes.R; ++r) ++begin[image(boxes, B, r) + 1];
    for (int64_t b = 0; b < B; ++b) begin[b + 1] += begin[b];
    std::vector<int64_t> next(begin.begin(), begin.end());
    for (int64_t r = 0; r < boxes.R; ++r) order[next[image(boxes, B, r)]++] = r;
  }

  static int64_t image(const RoiBoxes& boxes, int64_t B, int64_t r) {
    return boxes.batch ? boxes.batch[r] : r / (boxes.R / B);
  }
};

// Throws std::invalid_argument for a batch index outside [0, B).
inline void require_batch(const char* op, const RoiBoxes& boxes, int64_t B) {
  if (boxes.batch) require_in_range(std::string(op) + ": boxes' batch index", boxes.batch, 0, 1, 1, boxes.R, B);
}

// Room for the taps of `boxes` boxes along one axis.
template <class F>
class RoiAxisTable {
 public:
  RoiAxisTable(int64_t boxes, int64_t bins, int64_t sampling_ratio, int64_t size)
      : bins_(bins),
        taps_(taps_of_bin(sampling_ratio, size)),
        begin_(boxes * (bins + 1)),
        tap_(boxes * bins * taps_),
        cell_(boxes * bins * taps_),
        cells_(boxes) {}

  int64_t taps() const { return taps_; }  // of a bin, at most

  RoiAxis<F> of(int64_t box) const {
    const int64_t first = box * bins_ * taps_;
    return {begin_.data() + box * (bins_ + 1), tap_.data() + first, cell_.data() + first, cells_[box]};
  }

  template <class Box>
  void fill(int64_t box, BoxSide<Box> side, int64_t sampling_ratio, int64_t size) {
    const int64_t first = box * bins_ * taps_;
    int32_t* const begin = begin_.data() + box * (bins_ + 1);
    cells_[box] = fill_taps(side, bins_, sampling_ratio, size, begin, tap_.data() + first);
    for (int32_t i = 0; i < begin[bins_]; ++i) cell_[first + tap_[first + i].ordinal] = tap_[first + i].cell;
  }

  void fill_empty(int64_t box) {
    cells_[box] = fill_no_taps(bins_, begin_.data() + box * (bins_ + 1));
  }

 private:
  int64_t bins_, taps_;
  std::vector<int32_t> begin_;
  std::vector<RoiTap<F>> tap_;
  std::vector<int32_t> cell_, cells_;
};

}  // namespace evad
