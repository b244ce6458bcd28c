// Forward: levels to channels-last, then one task a (panel of channels, box). Backward: one task a (image, level,
// panel), which owns its cells and goes through the boxes in order: no sum depends on the number of threads.
#include "pyramid_roi_align.h"

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

namespace evad {
namespace {

// Level and weights of every box, and the rows of every (image, level) that boxes touch.
template <class F>
class Weights {
 public:
  Weights(const Pyramid& pyramid, const RoiBoxes& boxes, const RoiSampling& sampling, int threads)
      : level_(boxes.R),
        rows_(boxes.R, sampling.oh, sampling.sampling_ratio, longest(pyramid, &PyramidLevel::h)),
        columns_(boxes.R, sampling.ow, sampling.sampling_ratio, longest(pyramid, &PyramidLevel::w)) {
    if (boxes.is_double)
      fill(static_cast<const double*>(boxes.corners), pyramid, boxes, sampling, threads);
    else
      fill(static_cast<const float*>(boxes.corners), pyramid, boxes, sampling, threads);
    shape_ = roi_shape(sampling, 0, rows_.taps(), columns_.taps());
  }

  RoiShape shape(int64_t Gw) const { return {shape_.oh, shape_.ow, Gw, shape_.cells}; }
  int64_t level(int64_t r) const { return level_[r]; }
  RoiBox<F> of(int64_t r) const { return {rows_.of(r), columns_.of(r)}; }

 private:
  static int64_t longest(const Pyramid& pyramid, int64_t PyramidLevel::*side) {
    int64_t size = 1;
    for (int64_t l = 0; l < pyramid.count; ++l) size = std::max(size, pyramid.level[l].*side);
    return size;
  }

  template <class Box>
  void fill(const Box* corners, const Pyramid& pyramid, const RoiBoxes& boxes, const RoiSampling& s, int threads) {
    parallel_for(
        boxes.R, threads,
        [&](int64_t r) {
          const Box* box = corners + r * 4;
          level_[r] = pyramid_level(box, static_cast<Box>(pyramid.canonical_size), pyramid.canonical_level,
                                    pyramid.first, pyramid.count);
          if (!is_box(box)) {
            rows_.fill_empty(r);
            columns_.fill_empty(r);
            return;
          }
          const PyramidLevel& level = pyramid.level[level_[r]];
          const Box scale = static_cast<Box>(1 / level.pixels_per_cell);
          columns_.fill(r, box_side(box[0], box[2], scale, s.ow, s.aligned), s.sampling_ratio, level.w);
          rows_.fill(r, box_side(box[1], box[3], scale, s.oh, s.aligned), s.sampling_ratio, level.h);
        },
        64);
  }

  std::vector<int64_t> level_;
  RoiAxisTable<F> rows_, columns_;
  RoiShape shape_;
};

// Pointers to the C features of every cell of every (image, level).
template <class T>
class Cells {
 public:
  using F = accumulate_t<T>;

  Cells(const Pyramid& pyramid, const BoxesByImage& by_image, const Weights<F>& weights, const RoiKernels<F>& kernels,
        int threads)
      : kernels_(kernels), levels_(pyramid.count), row_(pyramid.B * pyramid.count) {
    for (int64_t b = 0; b < pyramid.B; ++b) {
      // Rows [top, bottom) of each level that the image's boxes touch.
      std::vector<int64_t> top(levels_), bottom(levels_, 0);
      for (int64_t l = 0; l < levels_; ++l) top[l] = pyramid.level[l].h;
      for (int64_t i = by_image.begin[b]; i < by_image.begin[b + 1]; ++i) {
        const int64_t l = weights.level(by_image.order[i]);
        const RoiAxis<F> rows = weights.of(by_image.order[i]).rows;
        const int32_t taps = rows.begin[weights.shape(0).oh];
        if (taps == 0) continue;
        top[l] = std::min<int64_t>(top[l], rows.tap[0].cell);
        bottom[l] = std::max<int64_t>(bottom[l], rows.tap[taps - 1].cell + 1);
      }
      for (int64_t l = 0; l < levels_; ++l)
        if (top[l] < bottom[l]) add(pyramid, b, l, top[l], bottom[l], threads);
    }
  }

  const F* const* of(int64_t b, int64_t l) const { return row_[b * levels_ + l].data(); }

 private:
  void add(const Pyramid& pyramid, int64_t b, int64_t l, int64_t top, int64_t bottom, int threads) {
    const PyramidLevel& level = pyramid.level[l];
    const T* const from = static_cast<const T*>(level.data) + b * level.stride_b;
    std::vector<const F*>& row = row_[b * levels_ + l];
    row.resize(level.h * level.w);
    if constexpr (std::is_same_v<T, F>) {
      if (level.stride_c == 1 || pyramid.C == 1) {
        for (int64_t y = top; y < bottom; ++y)
          for (int64_t x = 0; x < level.w; ++x) row[y * level.w + x] = from + y * level.stride_h + x * level.stride_w;
        return;
      }
    }
    const int64_t C = pyramid.C;
    F* const copy = copies_.emplace_back(new F[(bottom - top) * level.w * C]).get();
    for (int64_t y = top; y < bottom; ++y)
      for (int64_t x = 0; x < level.w; ++x) row[y * level.w + x] = copy + ((y - top) * level.w + x) * C;
    // Rows that follow each other in memory are one run of cells.
    const bool one_run = level.stride_h == level.w * level.stride_w;
    const int64_t run = one_run ? (bottom - top) * level.w : level.w, runs = one_run ? 1 : bottom - top;
    const int64_t pieces = (run + kCells - 1) / kCells;
    parallel_for(runs * pieces, threads, [&](int64_t task) {
      const int64_t row = task / pieces, begin = task % pieces * kCells, count = std::min(kCells, run - begin);
      const T* const first = from + (top + row) * level.stride_h + begin * level.stride_w;
      F* const to = copy + (row * run + begin) * C;
      for (int64_t c = 0; c < C; c += kChannels)
        turn(first + c * level.stride_c, level.stride_c, level.stride_w, std::min(kChannels, C - c), count, to + c, C);
    });
  }

  // to[cell * C + c] = from[c * stride_c + cell * stride_w]
  void turn(const T* from, int64_t stride_c, int64_t stride_w, int64_t channels, int64_t cells, F* to,
            int64_t C) const {
    if constexpr (std::is_same_v<T, F>) {
      if (stride_w == 1) return kernels_.transpose(from, stride_c, channels, cells, to, C);
    }
    F tile[kChannels * kCells];
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t cell = 0; cell < cells; ++cell)
        tile[c * kCells + cell] = to_float(from[c * stride_c + cell * stride_w]);
    kernels_.transpose(tile, kCells, channels, cells, to, C);
  }

  static constexpr int64_t kCells = 64, kChannels = 16;  // a tile stays in the first-level cache

  RoiKernels<F> kernels_;
  int64_t levels_;
  std::vector<std::vector<const F*>> row_;
  std::vector<std::unique_ptr<F[]>> copies_;
};

}  // namespace

template <class T>
void pyramid_roi_align_forward(const Pyramid& pyramid, const RoiBoxes& boxes, const RoiSampling& sampling,
                                     T* samples, int threads) {
  using F = accumulate_t<T>;
  require_batch("pyramid_roi_align", boxes, pyramid.B);
  if (boxes.R == 0 || pyramid.C == 0) return;
  const RoiKernels<F> kernels = roi_kernels<F>();
  const Weights<F> weights(pyramid, boxes, sampling, threads);
  const Cells<T> cells(pyramid, BoxesByImage(boxes, pyramid.B), weights, kernels, threads);
  const int64_t bins = sampling.oh * sampling.ow, panel = kernels.panel;
  const int64_t panels = (pyramid.C + panel - 1) / panel, tile = bins * panel;
  parallel_for_with_workspace<F>(
      panels * boxes.R, 2 * tile + roi_workspace(weights.shape(0), panel), threads, [&](int64_t task, F* workspace) {
        const int64_t r = task % boxes.R, begin = task / boxes.R * panel, count = std::min(panel, pyramid.C - begin);
        const int64_t b = BoxesByImage::image(boxes, pyramid.B, r), l = weights.level(r);
        kernels.bins(weights.shape(pyramid.level[l].w), weights.of(r), cells.of(b, l), begin, count, workspace,
                     workspace + 2 * tile);
        T* const to = samples + (r * pyramid.C + begin) * bins;
        if constexpr (std::is_same_v<T, F>) {
          kernels.transpose(workspace, count, bins, count, to, bins);
        } else {
          F* const turned = workspace + tile;
          kernels.transpose(workspace, count, bins, count, turned, bins);
          for (int64_t i = 0; i < count * bins; ++i) to[i] = from_float<T>(turned[i]);
        }
      });
}

template <class T>
void pyramid_roi_align_backward(const Pyramid& pyramid, const RoiBoxes& boxes, const RoiSampling& sampling,
                                      const T* grad_samples, int threads) {
  using F = accumulate_t<T>;
  require_batch("pyramid_roi_align", boxes, pyramid.B);
  if (pyramid.B == 0 || pyramid.C == 0) return;
  const RoiKernels<F> kernels = roi_kernels<F>();
  const Weights<F> weights(pyramid, boxes, sampling, threads);
  const BoxesByImage by_image(boxes, pyramid.B);
  const int64_t bins = sampling.oh * sampling.ow, panel = kernels.panel;
  const int64_t panels = (pyramid.C + panel - 1) / panel, tile = bins * panel;
  int64_t largest = 0;
  for (int64_t l = 0; l < pyramid.count; ++l) largest = std::max(largest, pyramid.level[l].h * pyramid.level[l].w);
  parallel_for_with_workspace<F>(
      pyramid.count * pyramid.B * panels, largest * panel + 2 * tile + roi_workspace(weights.shape(0), panel), threads,
      [&](int64_t task, F* workspace) {
        const int64_t l = task % pyramid.count, b = task / pyramid.count / panels;
        const int64_t begin = task / pyramid.count % panels * panel, count = std::min(panel, pyramid.C - begin);
        const PyramidLevel& level = pyramid.level[l];
        const int64_t cells = level.h * level.w;
        F* const grad_cells = workspace;
        F* const grad_bins = workspace + largest * panel;
        std::fill_n(grad_cells, cells * count, F(0));
        for (int64_t i = by_image.begin[b]; i < by_image.begin[b + 1]; ++i) {
          const int64_t r = by_image.order[i];
          if (weights.level(r) != l) continue;
          const T* const from = grad_samples + (r * pyramid.C + begin) * bins;
          if constexpr (std::is_same_v<T, F>) {
            kernels.transpose(from, bins, count, bins, grad_bins, count);
          } else {
            F* const arriving = grad_bins + tile;
            for (int64_t i = 0; i < count * bins; ++i) arriving[i] = to_float(from[i]);
            kernels.transpose(arriving, bins, count, bins, grad_bins, count);
          }
          kernels.grad_bins(weights.shape(level.w), weights.of(r), grad_bins, count, grad_cells, grad_bins + 2 * tile);
        }
        T* const to = static_cast<T*>(level.data) + (b * pyramid.C + begin) * cells;
        for (int64_t c = 0; c < count; ++c)
          for (int64_t cell = 0; cell < cells; ++cell)
            to[c * cells + cell] = from_float<T>(grad_cells[cell * count + c]);
      });
}

#define EVAD_INSTANTIATE(T)                                                                                 \
  template void pyramid_roi_align_forward<T>(const Pyramid&, const RoiBoxes&, const RoiSampling&, T*, int); \
  template void pyramid_roi_align_backward<T>(const Pyramid&, const RoiBoxes&, const RoiSampling&, const T*, int);
EVAD_FOR_EVERY_DTYPE(EVAD_INSTANTIATE)
#undef EVAD_INSTANTIATE

}  // namespace evad
