// roi_pool_3d on a GPU. Launches: where each cell's token lies (cell_map.cu), the taps of all boxes (a thread a side of
// a box), then one kernel each way; a backward that gives the gradient of the background adds partial sums in another.
//
// Forward: a block owns an image, a panel of channels and some of the image's boxes. It brings kFrames frames of cells
// on chip, lets each of its warps pool boxes over them, and goes on to the next frames. A lane has 4 bytes of channels
// in all kFrames: what is found out about a box serves 32 lanes, and in each of them several sums. Rows of bins are
// taken in order: a column of cells is summed over the rows of the bins once, into registers; a bin is a sum of two or
// three such columns, and the largest stays in registers, so no bin is ever written. Reads K C elements from memory,
// and from L2 once for every block of an image and panel; writes R C. A grid of which not even one frame fits on chip
// is read through its slots instead.
//
// Backward: a warp owns 32 channels of some cells of one frame, on chip, and goes through the image's boxes in order.
// Only the bin of the maximum carries gradient: a lane adds its outer product of row and column weights. Every sum has
// one owner, so none needs atomics or depends on the order of blocks. Reads R T C bins and R C gradients, writes K C.
#include <type_traits>

#include "cuda_launch.cuh"
#include "roi_align_3d.h"

namespace evad {
namespace {

constexpr const char* kOp = "roi_pool_3d";
constexpr int kLanes = 32;
constexpr int kMostWarps = 16;          // of a block of the forward, and of those on a multiprocessor together
constexpr int kMostFrames = 4;          // of a lane
constexpr int64_t kMostBoxes = 32;      // of a block, whose sums are on chip
constexpr int kRowTaps = 4;             // of a bin in registers: all that two samples touch
constexpr int kTapsAtOnce = 4;          // of a bin and axis in the backward: as many
constexpr int64_t kSharedUnasked = 49152;  // bytes that a block has on chip without being asked
constexpr int64_t kOwnedBytes = kSharedUnasked;  // of a warp of the backward
constexpr int64_t kOwnersPerMultiprocessor = 6;
constexpr int kThreads = 128;  // of a block that goes through elements
constexpr int64_t kBytesBins = 256;

int64_t cut(int64_t items, int64_t size) { return (items + size - 1) / size; }

// A bin along the columns, as a walk over them meets it: weights of the last column but one and of the last one that
// were met before, or 0; then taps [first, end), of columns that are met now.
template <class F>
struct alignas(16) Step {
  F older, newer;
  int32_t first, end;
};

// What kernels read of all boxes; an item is a box, or a tube in one frame. of_row: taps of a bin along the rows, at
// most.
template <class F>
struct Taps {
  int items, oh, ow, of_row, of_item, begins;  // of_item: taps; begins: of an item's rows and columns
  RoiTap<F>* tap;
  Step<F>* step;
  int32_t* begin;

  Taps(void* memory, const RoiBoxes& boxes, const RoiSampling& sampling, int64_t Gh, int64_t Gw)
      : items(static_cast<int>(boxes.R * boxes.frames)),
        oh(static_cast<int>(sampling.oh)),
        ow(static_cast<int>(sampling.ow)),
        of_row(static_cast<int>(taps_of_bin(sampling.sampling_ratio, Gh))),
        of_item(oh * of_row + ow * static_cast<int>(taps_of_bin(sampling.sampling_ratio, Gw))),
        begins(oh + ow + 2),
        tap(static_cast<RoiTap<F>*>(memory)),
        step(reinterpret_cast<Step<F>*>(tap + static_cast<int64_t>(items) * of_item)),
        begin(reinterpret_cast<int32_t*>(step + static_cast<int64_t>(items) * ow)) {}

  int64_t bytes() const {
    return cut(items * (of_item * sizeof(RoiTap<F>) + ow * sizeof(Step<F>) + begins * sizeof(int32_t)), 16) * 16;
  }

  __device__ RoiTap<F>* rows(int item) const { return tap + static_cast<int64_t>(item) * of_item; }
  __device__ RoiTap<F>* columns(int item) const { return rows(item) + oh * of_row; }
  __device__ Step<F>* steps(int item) const { return step + static_cast<int64_t>(item) * ow; }
  __device__ int32_t* begin_rows(int item) const { return begin + static_cast<int64_t>(item) * begins; }
  __device__ int32_t* begin_columns(int item) const { return begin_rows(item) + oh + 1; }
};

template <class F>
__device__ void fill_steps(const int32_t* begin, const RoiTap<F>* tap, int bins, Step<F>* steps) {
  int met = 0;
  for (int q = 0; q < bins; ++q) {
    Step<F> step{0, 0, begin[q], begin[q + 1]};
    for (; step.first < step.end && tap[step.first].ordinal < met; ++step.first)
      (tap[step.first].ordinal == met - 1 ? step.newer : step.older) = tap[step.first].weight;
    met += step.end - step.first;
    steps[q] = step;
  }
}

// A thread a side of a box. It reads what it wrote, so it writes on chip, where `of_thread` bytes (0: in memory) are
// enough for its taps and where its bins begin.
// At least 1 block, here and below: without it ptxas spills, to fit in more than shared memory allows.
template <class F, class Box>
__global__ void __launch_bounds__(kLanes, 1)
    fill_taps_kernel(const Box* __restrict__ corners, Taps<F> taps, Box cells_per_pixel, int64_t sampling_ratio, bool aligned,
                     int64_t Gh, int64_t Gw, int of_thread) {
  extern __shared__ __align__(16) char memory[];
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kLanes) + threadIdx.x; i < 2 * int64_t{taps.items};
       i += gridDim.x * static_cast<int64_t>(kLanes)) {
    const int item = static_cast<int>(i / 2);
    const bool is_row = i % 2;
    const Box* const box = corners + i / 2 * 4;
    const int bins = is_row ? taps.oh : taps.ow;
    int32_t* const begin = is_row ? taps.begin_rows(item) : taps.begin_columns(item);
    RoiTap<F>* const tap = is_row ? taps.rows(item) : taps.columns(item);
    RoiTap<F>* const new_tap = of_thread ? reinterpret_cast<RoiTap<F>*>(memory + threadIdx.x * of_thread) : tap;
    int32_t* const new_begin =
        of_thread ? reinterpret_cast<int32_t*>(memory + (threadIdx.x + 1) * of_thread) - (bins + 1) : begin;
    if (is_box(box))
      fill_taps(box_side(box[is_row], box[2 + is_row], cells_per_pixel, bins, aligned), bins, sampling_ratio, is_row ? Gh : Gw,
                new_begin, new_tap);
    else
      fill_no_taps(bins, new_begin);
    if (!is_row) fill_steps(new_begin, new_tap, bins, taps.steps(item));
    if (of_thread == 0) continue;
    for (int k = 0; k < new_begin[bins]; ++k) tap[k] = new_tap[k];
    for (int k = 0; k <= bins; ++k) begin[k] = new_begin[k];
  }
}

// Boxes of an image, and which item of the taps a box has in a frame.
struct Boxes {
  RoiRows rows;
  int per_image, frames;

  __device__ int begin(int b) const { return rows.begin ? static_cast<int>(rows.begin[b]) : b * per_image; }
  __device__ int row(int i) const { return rows.order ? static_cast<int>(rows.order[i]) : i; }
  __device__ int item(int r, int t) const { return frames == 1 ? r : r * frames + t; }
};

__device__ void store_bin(void* largest, bool bytes, int64_t at, int bin) {
  if (bytes)
    static_cast<uint8_t*>(largest)[at] = static_cast<uint8_t>(bin);
  else
    static_cast<int32_t*>(largest)[at] = bin;
}
__device__ int load_bin(const void* largest, bool bytes, int64_t at) {
  return bytes ? static_cast<const uint8_t*>(largest)[at] : static_cast<const int32_t*>(largest)[at];
}

// A word of channels: what a lane has of a cell in one frame.
template <class T>
struct Channels {
  static constexpr int kCount = sizeof(T) < 4 ? 2 : 1;
  std::conditional_t<kCount == 2, uint32_t, T> word;

  __device__ accumulate_t<T> operator[](int v) const {
    if constexpr (kCount == 2)
      return to_float(T{static_cast<uint16_t>(word >> (16 * v))});
    else
      return to_float(word);
  }
  __device__ void set(int v, T x) {
    if constexpr (kCount == 2)
      word |= static_cast<uint32_t>(x.bits) << (16 * v);
    else
      word = x;
  }
};
template <class T>
constexpr int kPanel = kLanes * Channels<T>::kCount;

// 16 bytes of a row. Word j of chunk i of a panel is lane j * kParts + i's: so chunks reach the banks of shared memory
// without conflicts.
template <class T>
struct alignas(16) Chunk {
  static constexpr int kWords = 16 / sizeof(Channels<T>), kElements = 16 / sizeof(T), kParts = kLanes / kWords;
  Channels<T> word[kWords];
};
template <class T>
__device__ int first_channel(int lane) {  // of the panel's
  return (lane % Chunk<T>::kParts * Chunk<T>::kWords + lane / Chunk<T>::kParts) * Channels<T>::kCount;
}

// What a lane has of a cell: [cells, kLanes] on chip.
template <class T, int kFrames>
struct alignas(kFrames * sizeof(Channels<T>)) Cell {
  Channels<T> frame[kFrames];
};

// Where `find` (below) reads cells: at the sum of two offsets, of a row and of a column.
template <class T, int kFrames>
struct CellsOnChip {
  const char* lane;

  __device__ int offset(int cell) const { return cell * kLanes * static_cast<int>(sizeof(Cell<T, kFrames>)); }
  __device__ __forceinline__ Cell<T, kFrames> operator()(int offset) const {
    return *reinterpret_cast<const Cell<T, kFrames>*>(lane + offset);
  }
};

template <class T>
struct CellsInMemory {
  const TokenGrid<T>& grid;
  int64_t b, first, c;  // the frame's first cell, the lane's first channel

  __device__ int offset(int cell) const { return cell; }
  __device__ __forceinline__ Cell<T, 1> operator()(int cell) const {
    Cell<T, 1> channels{};
    if (const T* const row = grid.row(b, first + cell))
#pragma unroll
      for (int v = 0; v < Channels<T>::kCount; ++v)
        if (c + v < grid.C) channels.frame[0].set(v, row[c + v]);
    return channels;
  }
};

// `frames` frames of an image from frame t, of channels [begin, begin + kPanel); zeros beyond C.
template <class T, int kFrames>
__device__ void load_cells(const TokenGrid<T>& grid, int64_t b, int64_t t, int frames, int64_t begin, bool whole_chunks,
                           Cell<T, kFrames>* on_chip) {
  using Part = Chunk<T>;
  const int cells = static_cast<int>(grid.Gh * grid.Gw);
  for (int i = threadIdx.x; i < cells * Part::kParts; i += blockDim.x) {
    const int cell = i / Part::kParts, part = i % Part::kParts;
    const int64_t c = begin + part * Part::kElements;
    Part chunk[kFrames] = {};
#pragma unroll
    for (int f = 0; f < kFrames; ++f) {
      const T* const row = grid.row(b, (t + min(f, frames - 1)) * cells + cell);
      if (row == nullptr || c >= grid.C) continue;
      if (whole_chunks) {
        chunk[f] = *reinterpret_cast<const Part*>(row + c);
        continue;
      }
#pragma unroll
      for (int e = 0; e < Part::kElements; ++e)
        if (c + e < grid.C) chunk[f].word[e / Channels<T>::kCount].set(e % Channels<T>::kCount, row[c + e]);
    }
#pragma unroll
    for (int j = 0; j < Part::kWords; ++j) {
      Cell<T, kFrames> of_lane;
#pragma unroll
      for (int f = 0; f < kFrames; ++f) of_lane.frame[f] = chunk[f].word[j];
      on_chip[cell * kLanes + j * Part::kParts + part] = of_lane;
    }
  }
}

// Sums of a lane: kFrames frames of its channels.
template <class T, int kFrames>
struct Sums {
  using F = accumulate_t<T>;
  static constexpr int kChannels = Channels<T>::kCount;
  F of[kFrames][kChannels] = {};

  __device__ __forceinline__ void add(F weight, const Cell<T, kFrames>& cell) {
#pragma unroll
    for (int f = 0; f < kFrames; ++f)
#pragma unroll
      for (int v = 0; v < kChannels; ++v) of[f][v] = multiply_add(weight, cell.frame[f][v], of[f][v]);
  }
  __device__ __forceinline__ void add(F weight, const Sums& sums) {
#pragma unroll
    for (int f = 0; f < kFrames; ++f)
#pragma unroll
      for (int v = 0; v < kChannels; ++v) of[f][v] = multiply_add(weight, sums.of[f][v], of[f][v]);
  }
};

// The largest bin of a box in kFrames frames, and which it is.
template <class T, int kFrames, bool kTellBin>
struct Largest {
  using F = accumulate_t<T>;
  static constexpr int kChannels = Channels<T>::kCount;
  F value[kFrames][kChannels];
  int bin[kTellBin ? kFrames : 1][kChannels];

  template <class Cells>
  __device__ __forceinline__ void find(const Taps<F>& taps, int item, int Gw, const Cells& cells) {
#pragma unroll
    for (int f = 0; f < kFrames; ++f)
#pragma unroll
      for (int v = 0; v < kChannels; ++v) {
        value[f][v] = -INFINITY;
        bin[kTellBin ? f : 0][v] = 0;
      }
    const RoiTap<F>* row = taps.rows(item);
    const RoiTap<F>* const columns = taps.columns(item);
    const Step<F>* const steps = taps.steps(item);
    const int32_t* const begin = taps.begin_rows(item);
    for (int p = 0; p < taps.oh; ++p) {
      const int rows = begin[p + 1] - begin[p];
      if (rows == 0) {  // all bins of this row are 0
        keep(Sums<T, kFrames>{}, p * taps.ow);
        continue;
      }
      int first[kRowTaps];
      F weight[kRowTaps];
#pragma unroll
      for (int i = 0; i < kRowTaps; ++i) {
        first[i] = i < rows ? cells.offset(row[i].cell * Gw) : 0;
        weight[i] = i < rows ? row[i].weight : 0;
      }
      const auto sum_column = [&](int x) {
        Sums<T, kFrames> sum;
        sum.add(weight[0], cells(first[0] + x));
#pragma unroll
        for (int i = 1; i < kRowTaps; ++i) {
          if (i >= rows) return sum;
          sum.add(weight[i], cells(first[i] + x));
        }
        for (int i = kRowTaps; i < rows; ++i) sum.add(row[i].weight, cells(cells.offset(row[i].cell * Gw) + x));
        return sum;
      };
      Sums<T, kFrames> older, newer;  // columns
      for (int q = 0; q < taps.ow; ++q) {
        const Step<F> step = steps[q];
        Sums<T, kFrames> sum;
        if (step.older > 0) sum.add(step.older, older);
        if (step.newer > 0) sum.add(step.newer, newer);
        for (int i = step.first; i < step.end; ++i) {
          const RoiTap<F> column = columns[i];
          older = newer;
          newer = sum_column(cells.offset(column.cell));
          sum.add(column.weight, newer);
        }
        keep(sum, p * taps.ow + q);
      }
      row += rows;
    }
  }

  __device__ __forceinline__ void keep(const Sums<T, kFrames>& sum, int this_bin) {
#pragma unroll
    for (int f = 0; f < kFrames; ++f)
#pragma unroll
      for (int v = 0; v < kChannels; ++v) {
        if (kTellBin && is_larger(sum.of[f][v], value[f][v])) bin[f][v] = this_bin;
        value[f][v] = larger(sum.of[f][v], value[f][v]);
      }
  }
};

// How a forward is cut.
struct Blocks {
  int64_t panels, boxes;  // boxes: of a block at a time
  int frames;             // on chip; 0 where cells are read from memory
  int warps, sums, shared;  // bytes: where sums of boxes begin on chip, how many all are
  bool whole_chunks;  // rows of tokens and background are made of 16-byte chunks
};

template <class T, int kFrames, bool kOnChip, bool kTellBin>
__global__ void __launch_bounds__(kMostWarps* kLanes, 1)
    roi_pool_3d_forward_kernel(TokenGrid<T> grid, Boxes boxes, Taps<accumulate_t<T>> taps, Blocks blocks,
                               T* __restrict__ pooled, void* __restrict__ largest) {
  using F = accumulate_t<T>;
  extern __shared__ __align__(16) char memory[];
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int b = static_cast<int>(blockIdx.x / blocks.panels);
  const int64_t begin = blockIdx.x % blocks.panels * kPanel<T>;
  const int64_t c = begin + first_channel<T>(lane);
  const bool bytes = taps.oh * static_cast<int64_t>(taps.ow) <= kBytesBins;
  auto* const on_chip = reinterpret_cast<Cell<T, kFrames>*>(memory);  // [Gh * Gw, kLanes]
  F* const sums = reinterpret_cast<F*>(memory + blocks.sums) + lane * Channels<T>::kCount;  // [boxes, kPanel]

  const int end = boxes.begin(b + 1);
  for (int64_t first = boxes.begin(b) + blockIdx.y * blocks.boxes; first < end; first += gridDim.y * blocks.boxes) {
    const int first_box = static_cast<int>(first), count = static_cast<int>(min(blocks.boxes, end - first));
    for (int i = warp; i < count; i += blocks.warps)
      for (int v = 0; v < Channels<T>::kCount; ++v) sums[i * kPanel<T> + v] = 0;
    for (int64_t t = 0; t < grid.T; t += kFrames) {
      const int frames = static_cast<int>(min(static_cast<int64_t>(kFrames), grid.T - t));
      if (kOnChip) {
        __syncthreads();
        load_cells(grid, b, t, frames, begin, blocks.whole_chunks, on_chip);
        __syncthreads();
      }
      for (int i = warp; i < count; i += blocks.warps) {
        const int r = boxes.row(first_box + i);
        Largest<T, kFrames, kTellBin> found;
        const int Gw = static_cast<int>(grid.Gw), item = boxes.item(r, static_cast<int>(t));
        if constexpr (kOnChip)
          found.find(taps, item, Gw, CellsOnChip<T, kFrames>{memory + lane * sizeof(Cell<T, kFrames>)});
        else
          found.find(taps, item, Gw, CellsInMemory<T>{grid, b, t * grid.Gh * grid.Gw, c});
#pragma unroll
        for (int f = 0; f < kFrames; ++f)
#pragma unroll
          for (int v = 0; v < Channels<T>::kCount; ++v) {
            if (f >= frames) continue;
            sums[i * kPanel<T> + v] += found.value[f][v];
            if (kTellBin && c + v < grid.C)
              store_bin(largest, bytes, (r * grid.T + t + f) * grid.C + c + v, found.bin[f][v]);
          }
      }
    }
    for (int i = warp; i < count; i += blocks.warps)
      for (int v = 0; v < Channels<T>::kCount; ++v)
        if (c + v < grid.C)
          pooled[boxes.row(first_box + i) * grid.C + c + v] =
              from_float<T>(sums[i * kPanel<T> + v] / static_cast<F>(grid.T));
  }
}

// How a backward is cut: a warp owns `cells` cells of a frame for `images` images, one after the other.
struct Owners {
  int64_t panels, cells, images;
  int64_t runs, groups;  // of cells in a frame, of images
};

// grad_cells, of cells [first, first + count), plus grad times row weights times column weights, of kTapsAtOnce taps at
// most. What is read waits for nothing that is written: the taps of a bin are different cells.
template <class F>
__device__ __forceinline__ void add_outer_product(F grad, const RoiTap<F>* row_taps, int rows,
                                                  const RoiTap<F>* column_taps, int columns, int Gw, int first,
                                                  int count, F* grad_cells) {
  constexpr int kNowhere = -(1 << 30);
  int y[kTapsAtOnce], x[kTapsAtOnce];
  F of_row[kTapsAtOnce], of_column[kTapsAtOnce];
#pragma unroll
  for (int i = 0; i < kTapsAtOnce; ++i) {
    y[i] = i < rows ? row_taps[i].cell * Gw - first : 0;
    of_row[i] = i < rows ? grad * row_taps[i].weight : 0;
    x[i] = i < columns ? column_taps[i].cell : kNowhere;
    of_column[i] = i < columns ? column_taps[i].weight : 0;
  }
#pragma unroll
  for (int i = 0; i < kTapsAtOnce; ++i) {
    if (i >= rows) break;
    bool owned[kTapsAtOnce];
    F sum[kTapsAtOnce];
#pragma unroll
    for (int j = 0; j < kTapsAtOnce; ++j) {
      owned[j] = static_cast<unsigned>(y[i] + x[j]) < static_cast<unsigned>(count);
      if (owned[j]) sum[j] = grad_cells[(y[i] + x[j]) * kLanes];
    }
#pragma unroll
    for (int j = 0; j < kTapsAtOnce; ++j)
      if (owned[j]) grad_cells[(y[i] + x[j]) * kLanes] = multiply_add(of_row[i], of_column[j], sum[j]);
  }
}

// partial: F [groups, T * Gh * Gw, C], or double [groups, T, runs, C] where the background is one row, or null.
template <class T>
__global__ void __launch_bounds__(kLanes, 1)
    roi_pool_3d_backward_kernel(TokenGrid<T> grid, Boxes boxes, Taps<accumulate_t<T>> taps, Owners owners,
                                const T* __restrict__ grad_pooled, const void* __restrict__ largest,
                                T* __restrict__ grad_tokens, void* __restrict__ partial) {
  using F = accumulate_t<T>;
  extern __shared__ __align__(16) char memory[];
  const int64_t c = blockIdx.x % owners.panels * kLanes + threadIdx.x, owner = blockIdx.x / owners.panels;
  if (c >= grid.C) return;
  const int64_t run = owner % owners.runs, group = owner / owners.runs / grid.T;
  const int t = static_cast<int>(owner / owners.runs % grid.T);
  const int frame = static_cast<int>(grid.Gh * grid.Gw), first = static_cast<int>(run * owners.cells);
  const int count = static_cast<int>(min(owners.cells, frame - run * owners.cells));
  const bool bytes = taps.oh * static_cast<int64_t>(taps.ow) <= kBytesBins;
  F* const grad_cells = reinterpret_cast<F*>(memory) + threadIdx.x;  // [cells, kLanes], of this lane
  F* const of_cells =
      partial && grid.background_per_cell
          ? static_cast<F*>(partial) + ((group * grid.T + t) * frame + first) * grid.C + c
          : nullptr;
  double of_row = 0;

  const int C = static_cast<int>(grid.C), TC = static_cast<int>(grid.T) * C, Gw = static_cast<int>(grid.Gw);
  const int64_t of_lane = t * grid.C + c;  // in a box's bins
  const F frames = static_cast<F>(grid.T);
  const int first_image = static_cast<int>(group * owners.images);
  const int end_image = static_cast<int>(min(grid.B, first_image + owners.images));
  for (int b = first_image; b < end_image; ++b) {
    for (int cell = 0; cell < count; ++cell) grad_cells[cell * kLanes] = 0;
    const int begin_box = boxes.begin(b), end_box = boxes.begin(b + 1);
    // The next box's bin and gradient are on their way while one is added.
    int next_r = 0, next_bin = 0;
    T next_grad{};
    const auto fetch = [&](int i) {
      if (i >= end_box) return;
      next_r = boxes.row(i);
      next_bin = load_bin(largest, bytes, static_cast<int64_t>(next_r) * TC + of_lane);
      next_grad = grad_pooled[static_cast<int64_t>(next_r) * C + c];
    };
    fetch(begin_box);
    for (int i = begin_box; i < end_box; ++i) {
      const int p = next_bin / taps.ow, q = next_bin - p * taps.ow, item = boxes.item(next_r, t);
      const F grad = to_float(next_grad) / frames;
      fetch(i + 1);
      const int32_t *const rows = taps.begin_rows(item) + p, *const columns = taps.begin_columns(item) + q;
      const int end_y = rows[1], end_x = columns[1];
      for (int y = rows[0]; y < end_y; y += kTapsAtOnce)
        for (int x = columns[0]; x < end_x; x += kTapsAtOnce)
          add_outer_product(grad, taps.rows(item) + y, end_y - y, taps.columns(item) + x, end_x - x, Gw, first, count,
                            grad_cells);
    }
    const int32_t* const slot = grid.slot + (b * grid.T + t) * frame + first;
    for (int cell = 0; cell < count; ++cell) {
      const int32_t k = slot[cell];
      const F sum = grad_cells[cell * kLanes];
      if (k != kDropped) grad_tokens[(b * grid.K + k) * grid.C + c] = from_float<T>(sum);
      const F dropped = k == kDropped ? sum : F(0);
      if (of_cells) of_cells[cell * grid.C] = b == first_image ? dropped : of_cells[cell * grid.C] + dropped;
      of_row += dropped;
    }
  }
  if (partial && !of_cells)
    static_cast<double*>(partial)[((group * grid.T + t) * owners.runs + run) * grid.C + c] = of_row;
}

// grad_background[i] = the sum of partial[j * size + i] over j.
template <class T, class Partial>
__global__ void __launch_bounds__(kThreads)
    sum_partials_kernel(const Partial* __restrict__ partial, int64_t count, int64_t size,
                        T* __restrict__ grad_background) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < size;
       i += gridDim.x * static_cast<int64_t>(kThreads)) {
    Partial sum = 0;
    for (int64_t j = 0; j < count; ++j) sum += partial[j * size + i];
    grad_background[i] = from_float<T>(static_cast<accumulate_t<T>>(sum));
  }
}

template <class F>
Taps<F> filled_taps(const RoiBoxes& boxes, const RoiPixels& pixels, int64_t Gh, int64_t Gw, void* memory,
                    Stream stream) {
  const Taps<F> taps(memory, boxes, pixels.sampling, Gh, Gw);
  const int64_t of_rows = taps.oh * taps.of_row, most = std::max(of_rows, taps.of_item - of_rows);
  const int64_t bins = std::max(taps.oh, taps.ow);
  const int64_t parts = cut(most * sizeof(RoiTap<F>) + (bins + 1) * sizeof(int32_t), 16) | 1;  // odd: no bank conflicts
  const int shared = kLanes * parts * 16 <= kSharedUnasked ? static_cast<int>(kLanes * parts * 16) : 0;
  const auto launch = [&](auto zero) {
    using Box = decltype(zero);
    fill_taps_kernel<F, Box><<<blocks_for(2 * taps.items, kLanes), kLanes, shared, stream>>>(
        static_cast<const Box*>(boxes.corners), taps, static_cast<Box>(pixels.cells_per_pixel),
        pixels.sampling.sampling_ratio, pixels.sampling.aligned, Gh, Gw, shared / kLanes);
  };
  if (boxes.is_double)
    launch(double{});
  else
    launch(float{});
  check_launch(kOp);
  return taps;
}

template <class T>
Blocks forward_blocks(const TokenGrid<T>& grid, const RoiBoxes& boxes, const DeviceLimits& limits) {
  Blocks blocks{};
  const int64_t frame = grid.Gh * grid.Gw * kPanel<T> * sizeof(T), box = kPanel<T> * sizeof(accumulate_t<T>);
  const int64_t room = limits.shared_of_block - kMostBoxes * box;
  const int64_t most = boxes.frames > 1 || sizeof(T) > 4 ? 1 : std::min<int64_t>(grid.T, kMostFrames);
  for (int frames = kMostFrames; frames > 0 && blocks.frames == 0; frames /= 2)
    if (frames <= most && frames * frame <= room) blocks.frames = frames;
  blocks.panels = cut(grid.C, kPanel<T>);
  const int64_t beside = blocks.frames * frame + kMostBoxes * box + 1024;  // 1 KB is the system's
  const int64_t resident =
      std::min<int64_t>(std::max<int64_t>(limits.shared_of_multiprocessor / beside, 1), blocks.frames ? 4 : 2);
  const int64_t per_image = cut(boxes.R, grid.B), warps = kMostWarps / resident;
  // The fewest turns of warps over all waves of blocks, then the fewest warps beside each other. To bring cells on chip
  // takes a block about a third of a turn.
  int64_t least = INT64_MAX;
  for (int64_t count = std::min(per_image, kMostBoxes); count > 0; --count) {
    const int64_t waves = cut(grid.B * blocks.panels * cut(per_image, count), limits.multiprocessors * resident);
    const int64_t thirds = waves * (3 * cut(count, warps) + 1);
    if (thirds > least) continue;
    least = thirds;
    blocks.boxes = count;
  }
  blocks.boxes = cut(per_image, cut(per_image, blocks.boxes));
  blocks.warps = static_cast<int>(cut(blocks.boxes, cut(blocks.boxes, warps)));  // that share them evenly
  blocks.sums = static_cast<int>(blocks.frames * frame);
  blocks.shared = static_cast<int>(blocks.sums + blocks.boxes * box);
  const auto bits = reinterpret_cast<uint64_t>(grid.tokens) | reinterpret_cast<uint64_t>(grid.background) |
                    (grid.stride_b | grid.stride_k | grid.C) * sizeof(T);
  blocks.whole_chunks = bits % sizeof(Chunk<T>) == 0;
  return blocks;
}

template <class T>
Owners backward_owners(const TokenGrid<T>& grid, bool grad_background, const DeviceLimits& limits) {
  Owners owners{};
  const int64_t frame = grid.Gh * grid.Gw, most = kOwnedBytes / (kLanes * sizeof(accumulate_t<T>));
  owners.panels = cut(grid.C, kLanes);
  owners.runs = cut(frame, most);
  owners.cells = cut(frame, owners.runs);
  owners.images = 1;
  if (grad_background) {  // fewer partial sums, as long as every multiprocessor has some owners
    const int64_t of_group = owners.panels * owners.runs * grid.T;
    const int64_t groups = cut(kOwnersPerMultiprocessor * limits.multiprocessors, of_group);
    owners.images = cut(grid.B, std::min(groups, grid.B));
  }
  owners.groups = cut(grid.B, owners.images);
  return owners;
}

}  // namespace

template <class T>
int64_t roi_pool_3d_work(const TokenGrid<T>& grid, const RoiBoxes& boxes, const RoiSampling& sampling,
                         bool grad_background) {
  const int64_t taps = Taps<accumulate_t<T>>(nullptr, boxes, sampling, grid.Gh, grid.Gw).bytes();
  if (!grad_background) return taps;
  const Owners owners = backward_owners(grid, true, device_limits(kOp));
  const int64_t sums = owners.groups * grid.T * grid.C;
  return taps + (grid.background_per_cell ? sums * grid.Gh * grid.Gw * sizeof(accumulate_t<T>)
                                          : sums * owners.runs * sizeof(double));
}

template <class T>
void roi_pool_3d_forward(const TokenGrid<T>& grid, const RoiBoxes& boxes, const RoiRows& rows, const RoiPixels& pixels,
                         T* pooled, void* largest, void* work, Stream stream) {
  using F = accumulate_t<T>;
  if (grid.B == 0 || boxes.R == 0 || grid.C == 0) return;
  const DeviceLimits limits = device_limits(kOp);
  const Taps<F> taps = filled_taps<F>(boxes, pixels, grid.Gh, grid.Gw, work, stream);
  const Blocks blocks = forward_blocks(grid, boxes, limits);
  const int64_t per_image = cut(boxes.R, grid.B);
  const Boxes of_images{rows, static_cast<int>(boxes.R / grid.B), static_cast<int>(boxes.frames)};
  const auto launch = [&](auto* kernel) {
    allow_shared(kernel, limits);
    const dim3 size(static_cast<unsigned>(grid.B * blocks.panels),
                    static_cast<unsigned>(std::min(cut(per_image, blocks.boxes), kMaxBlocksY)));
    kernel<<<size, blocks.warps * kLanes, blocks.shared, stream>>>(grid, of_images, taps, blocks, pooled, largest);
    check_launch(kOp);
  };
  const auto with_bins = [&](auto tell) {
    constexpr bool kTell = decltype(tell)::value;
    if (blocks.frames == 0) return launch(roi_pool_3d_forward_kernel<T, 1, false, kTell>);
    if (blocks.frames == 1) return launch(roi_pool_3d_forward_kernel<T, 1, true, kTell>);
    if constexpr (sizeof(T) <= 4) {
      if (blocks.frames == 2) return launch(roi_pool_3d_forward_kernel<T, 2, true, kTell>);
      launch(roi_pool_3d_forward_kernel<T, 4, true, kTell>);
    }
  };
  if (largest)
    with_bins(std::true_type{});
  else
    with_bins(std::false_type{});
}

template <class T>
void roi_pool_3d_backward(const TokenGrid<T>& grid, const RoiBoxes& boxes, const RoiRows& rows, const RoiPixels& pixels,
                          const T* grad_pooled, const void* largest, T* grad_tokens, T* grad_background, void* work,
                          Stream stream) {
  using F = accumulate_t<T>;
  if (grid.B == 0 || boxes.R == 0 || grid.C == 0) return;
  const DeviceLimits limits = device_limits(kOp);
  const Taps<F> taps = filled_taps<F>(boxes, pixels, grid.Gh, grid.Gw, work, stream);
  const Owners owners = backward_owners(grid, grad_background != nullptr, limits);
  void* const partial = grad_background ? static_cast<char*>(work) + taps.bytes() : nullptr;
  const Boxes of_images{rows, static_cast<int>(boxes.R / grid.B), static_cast<int>(boxes.frames)};
  const int64_t shared = owners.cells * kLanes * sizeof(F);
  roi_pool_3d_backward_kernel<T><<<owners.groups * grid.T * owners.runs * owners.panels, kLanes, shared, stream>>>(
      grid, of_images, taps, owners, grad_pooled, largest, grad_tokens, partial);
  check_launch(kOp);
  if (!grad_background) return;
  const int64_t size = grid.C * (grid.background_per_cell ? grid.T * grid.Gh * grid.Gw : 1);
  if (grid.background_per_cell)
    sum_partials_kernel<T, F><<<blocks_for(size, kThreads), kThreads, 0, stream>>>(static_cast<const F*>(partial),
                                                                                 owners.groups, size, grad_background);
  else
    sum_partials_kernel<T, double><<<blocks_for(size, kThreads), kThreads, 0, stream>>>(
        static_cast<const double*>(partial), owners.groups * grid.T * owners.runs, size, grad_background);
  check_launch(kOp);
}

#define EVAD_INSTANTIATE(T)                                                                                          \
  template int64_t roi_pool_3d_work<T>(const TokenGrid<T>&, const RoiBoxes&, const RoiSampling&, bool);              \
  template void roi_pool_3d_forward<T>(const TokenGrid<T>&, const RoiBoxes&, const RoiRows&, const RoiPixels&, T*,   \
                                       void*, void*, Stream);                                                        \
  template void roi_pool_3d_backward<T>(const TokenGrid<T>&, const RoiBoxes&, const RoiRows&, const RoiPixels&,      \
                                        const T*, const void*, T*, T*, void*, Stream);
EVAD_FOR_EVERY_DTYPE(EVAD_INSTANTIATE)
#undef EVAD_INSTANTIATE

}  // namespace evad
