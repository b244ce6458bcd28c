// roi_align_3d: one task a (panel of channels, box). roi_pool_3d: one task a (panel, 16 boxes), which takes the frames
// one after the other: the panel of a frame about fills the first-level cache, so boxes find each other's cells there.
// Backward: one task a (image, panel of channels, frame), which owns its cells and goes through the boxes in order: no
// sum depends on the number of threads, and nothing is added atomically. All images are one task where they share the
// gradient of a background.
#include "roi_align_3d.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cell_map.h"
#include "roi_tables.h"

namespace evad {
namespace {

constexpr int64_t kBytesBins = 256;  // as many bins can be told by a byte
constexpr int64_t kBoxes = 16;       // of a task of roi_pool_3d

// Weights of every box (tubes: of every frame of it).
template <class F>
class Weights {
 public:
  Weights(const RoiBoxes& boxes, const RoiPixels& pixels, int64_t Gh, int64_t Gw, int threads)
      : frames_(boxes.frames),
        rows_(boxes.R * boxes.frames, pixels.sampling.oh, pixels.sampling.sampling_ratio, Gh),
        columns_(boxes.R * boxes.frames, pixels.sampling.ow, pixels.sampling.sampling_ratio, Gw) {
    if (boxes.is_double)
      fill(static_cast<const double*>(boxes.corners), boxes, pixels, Gh, Gw, threads);
    else
      fill(static_cast<const float*>(boxes.corners), boxes, pixels, Gh, Gw, threads);
    shape_ = roi_shape(pixels.sampling, Gw, rows_.taps(), columns_.taps());
  }

  const RoiShape& shape() const { return shape_; }

  RoiBox<F> of(int64_t r, int64_t frame) const {
    const int64_t item = r * frames_ + (frames_ == 1 ? 0 : frame);
    return {rows_.of(item), columns_.of(item)};
  }

 private:
  template <class Box>
  void fill(const Box* corners, const RoiBoxes& boxes, const RoiPixels& pixels, int64_t Gh, int64_t Gw, int threads) {
    const RoiSampling& s = pixels.sampling;
    const Box scale = static_cast<Box>(pixels.cells_per_pixel);
    parallel_for(
        boxes.R * boxes.frames, threads,
        [&](int64_t item) {
          const Box* box = corners + item * 4;
          if (!is_box(box)) {
            rows_.fill_empty(item);
            columns_.fill_empty(item);
            return;
          }
          columns_.fill(item, box_side(box[0], box[2], scale, s.ow, s.aligned), s.sampling_ratio, Gw);
          rows_.fill(item, box_side(box[1], box[3], scale, s.oh, s.aligned), s.sampling_ratio, Gh);
        },
        64);
  }

  int64_t frames_;
  RoiAxisTable<F> rows_, columns_;
  RoiShape shape_;
};

// [B, cells] pointers to rows of C: token, background or zeros.
template <class F>
class Cells {
 public:
  explicit Cells(const TokenGrid<F>& grid, int threads)
      : cells_(grid.T * grid.Gh * grid.Gw), zeros_(grid.background ? 0 : grid.C), row_(grid.B * cells_) {
    parallel_for(
        grid.B, threads,
        [&](int64_t b) {
          for (int64_t cell = 0; cell < cells_; ++cell) {
            const F* const row = grid.row(b, cell);
            row_[b * cells_ + cell] = row ? row : zeros_.data();
          }
        },
        1);
  }
  const F* const* of(int64_t b) const { return row_.data() + b * cells_; }

 private:
  int64_t cells_;
  std::vector<F> zeros_;
  std::vector<const F*> row_;
};

}  // namespace

template <class T>
void roi_align_3d_forward(const TokenGrid<accumulate_t<T>>& grid, const RoiBoxes& boxes, const RoiPixels& pixels,
                                T* samples, int threads) {
  using F = accumulate_t<T>;
  require_batch("roi_align_3d", boxes, grid.B);
  if (boxes.R == 0 || grid.C == 0) return;
  const RoiKernels<F> kernels = roi_kernels<F>();
  const Weights<F> weights(boxes, pixels, grid.Gh, grid.Gw, threads);
  const Cells<F> cells(grid, threads);
  const RoiShape& shape = weights.shape();
  const int64_t bins = shape.oh * shape.ow, frame = grid.Gh * grid.Gw, panel = kernels.panel;
  const int64_t panels = (grid.C + panel - 1) / panel, tile = bins * panel;
  parallel_for_with_workspace<F>(
      panels * boxes.R, tile + roi_workspace(shape, panel), threads, [&](int64_t task, F* workspace) {
        const int64_t r = task % boxes.R, begin = task / boxes.R * panel, count = std::min(panel, grid.C - begin);
        const F* const* const cell = cells.of(BoxesByImage::image(boxes, grid.B, r));
        for (int64_t t = 0; t < grid.T; ++t) {
          kernels.bins(shape, weights.of(r, t), cell + t * frame, begin, count, workspace, workspace + tile);
          for (int64_t c = 0; c < count; ++c) {
            T* const to = samples + ((r * grid.C + begin + c) * grid.T + t) * bins;
            for (int64_t bin = 0; bin < bins; ++bin) to[bin] = from_float<T>(workspace[bin * count + c]);
          }
        }
      });
}

template <class T>
void roi_pool_3d_forward(const TokenGrid<accumulate_t<T>>& grid, const RoiBoxes& boxes, const RoiPixels& pixels,
                               T* pooled, void* largest, int threads) {
  using F = accumulate_t<T>;
  require_batch("roi_pool_3d", boxes, grid.B);
  if (boxes.R == 0 || grid.C == 0) return;
  const RoiKernels<F> kernels = roi_kernels<F>();
  const Weights<F> weights(boxes, pixels, grid.Gh, grid.Gw, threads);
  const Cells<F> cells(grid, threads);
  const RoiShape& shape = weights.shape();
  const int64_t frame = grid.Gh * grid.Gw, panel = kernels.panel, panels = (grid.C + panel - 1) / panel;
  const bool bytes = shape.oh * shape.ow <= kBytesBins;
  const int64_t groups = (boxes.R + kBoxes - 1) / kBoxes;
  parallel_for_with_workspace<F>(
      panels * groups, (kBoxes + 1) * panel + roi_workspace(shape, panel), threads, [&](int64_t task, F* workspace) {
        const int64_t first = task % groups * kBoxes, last = std::min(boxes.R, first + kBoxes);
        const int64_t begin = task / groups * panel, count = std::min(panel, grid.C - begin);
        F* const sums = workspace;
        int32_t* const index = largest ? reinterpret_cast<int32_t*>(workspace + kBoxes * panel) : nullptr;
        F* const rest = workspace + (kBoxes + 1) * panel;
        std::fill_n(sums, (last - first) * count, F(0));
        for (int64_t t = 0; t < grid.T; ++t)
          for (int64_t r = first; r < last; ++r) {
            const F* const* const cell = cells.of(BoxesByImage::image(boxes, grid.B, r)) + t * frame;
            F* const sum = sums + (r - first) * count;
            kernels.largest(shape, weights.of(r, t), cell, begin, count, sum, index, rest);
            const int64_t at = (r * grid.T + t) * grid.C + begin;
            if (largest && bytes)
              for (int64_t c = 0; c < count; ++c)
                static_cast<uint8_t*>(largest)[at + c] = static_cast<uint8_t>(index[c]);
            else if (largest)
              std::memcpy(static_cast<int32_t*>(largest) + at, index, count * sizeof(int32_t));
          }
        for (int64_t r = first; r < last; ++r)
          for (int64_t c = 0; c < count; ++c)
            pooled[r * grid.C + begin + c] = from_float<T>(sums[(r - first) * count + c] / static_cast<F>(grid.T));
      });
}

template <class T>
void roi_3d_backward(const TokenGrid<accumulate_t<T>>& grid, const RoiBoxes& boxes, const RoiPixels& pixels,
                           const T* grad, const void* largest, T* grad_tokens, T* grad_background, int threads) {
  using F = accumulate_t<T>;
  require_batch("roi_align_3d", boxes, grid.B);
  if (grid.C == 0) return;
  const RoiKernels<F> kernels = roi_kernels<F>();
  const Weights<F> weights(boxes, pixels, grid.Gh, grid.Gw, threads);
  const BoxesByImage by_image(boxes, grid.B);
  const RoiShape& shape = weights.shape();
  const int64_t bins = shape.oh * shape.ow, frame = grid.Gh * grid.Gw, cells = grid.T * frame;
  const bool bytes = bins <= kBytesBins;
  // Half a panel where single bins are scattered: the frame's cells then stay in the first-level cache.
  const int64_t panel = largest ? std::max<int64_t>(kernels.panel / 2, 16) : kernels.panel;
  const int64_t panels = (grid.C + panel - 1) / panel;
  // [C]: one sum a frame, added up in order at the end.
  std::vector<double> background_sum(grad_background && !grid.background_per_cell ? grid.T * grid.C : 0);
  std::vector<int32_t> row_of(bins), column_of(bins);
  for (int64_t bin = 0; bin < bins; ++bin) {
    row_of[bin] = static_cast<int32_t>(bin / shape.ow);
    column_of[bin] = static_cast<int32_t>(bin % shape.ow);
  }
  const int64_t tile = bins * panel, map = frame * panel;
  const int64_t images = grad_background ? grid.B : 1, parts = grad_background ? 1 : grid.B;  // of a task; of the batch
  parallel_for_with_workspace<F>(
      parts * panels * grid.T, tile + 2 * map + roi_workspace(shape, panel), threads, [&](int64_t task, F* workspace) {
        const int64_t t = task % grid.T, begin = task / grid.T % panels * panel;
        const int64_t count = std::min(panel, grid.C - begin), first = task / (grid.T * panels) * images;
        F* const grad_samples = workspace;
        F* const grad_cells = workspace + tile;
        F* const background_cells = grad_cells + map;
        if (grad_background && grid.background_per_cell) std::fill_n(background_cells, frame * count, F(0));
        for (int64_t b = first; b < first + images; ++b) {
          std::fill_n(grad_cells, frame * count, F(0));
          for (int64_t i = by_image.begin[b]; i < by_image.begin[b + 1]; ++i) {
            const int64_t r = by_image.order[i];
            const RoiBox<F> box = weights.of(r, t);
            if (!largest) {
              for (int64_t c = 0; c < count; ++c) {
                const T* const from = grad + ((r * grid.C + begin + c) * grid.T + t) * bins;
                for (int64_t bin = 0; bin < bins; ++bin) grad_samples[bin * count + c] = to_float(from[bin]);
              }
              kernels.grad_bins(shape, box, grad_samples, count, grad_cells, background_cells + map);
              continue;
            }
            for (int64_t c = 0; c < count; ++c) {
              const int64_t at = (r * grid.T + t) * grid.C + begin + c;
              const int64_t bin =
                  bytes ? static_cast<const uint8_t*>(largest)[at] : static_cast<const int32_t*>(largest)[at];
              const F g = to_float(grad[r * grid.C + begin + c]) / static_cast<F>(grid.T);
              const int32_t p = row_of[bin], q = column_of[bin];
              for (int32_t y = box.rows.begin[p]; y < box.rows.begin[p + 1]; ++y) {
                const F of_row = g * box.rows.tap[y].weight;
                F* const in_row = grad_cells + box.rows.tap[y].cell * grid.Gw * count + c;
                for (int32_t x = box.columns.begin[q]; x < box.columns.begin[q + 1]; ++x)
                  in_row[box.columns.tap[x].cell * count] += of_row * box.columns.tap[x].weight;
              }
            }
          }
          for (int64_t cell = 0; cell < frame; ++cell) {
            const int32_t k = grid.slot[b * cells + t * frame + cell];
            const F* const from = grad_cells + cell * count;
            if (k >= 0) {
              T* const to = grad_tokens + (b * grid.K + k) * grid.C + begin;
              for (int64_t c = 0; c < count; ++c) to[c] = from_float<T>(from[c]);
            } else if (grad_background && grid.background_per_cell) {
              for (int64_t c = 0; c < count; ++c) background_cells[cell * count + c] += from[c];
            } else if (grad_background) {
              for (int64_t c = 0; c < count; ++c) background_sum[t * grid.C + begin + c] += from[c];
            }
          }
        }
        if (grad_background && grid.background_per_cell)
          for (int64_t cell = 0; cell < frame; ++cell)
            for (int64_t c = 0; c < count; ++c)
              grad_background[(t * frame + cell) * grid.C + begin + c] =
                  from_float<T>(background_cells[cell * count + c]);
      });
  if (grad_background && !grid.background_per_cell)
    for (int64_t c = 0; c < grid.C; ++c) {
      double sum = 0;
      for (int64_t t = 0; t < grid.T; ++t) sum += background_sum[t * grid.C + c];
      grad_background[c] = from_float<T>(static_cast<F>(sum));
    }
}

#define EVAD_INSTANTIATE(T)                                                                                        \
  template void roi_align_3d_forward<T>(const TokenGrid<accumulate_t<T>>&, const RoiBoxes&, const RoiPixels&, T*,  \
                                        int);                                                                      \
  template void roi_pool_3d_forward<T>(const TokenGrid<accumulate_t<T>>&, const RoiBoxes&, const RoiPixels&, T*,   \
                                       void*, int);                                                                \
  template void roi_3d_backward<T>(const TokenGrid<accumulate_t<T>>&, const RoiBoxes&, const RoiPixels&, const T*, \
                                   const void*, T*, T*, int);
EVAD_FOR_EVERY_DTYPE(EVAD_INSTANTIATE)
#undef EVAD_INSTANTIATE

}  // namespace evad
