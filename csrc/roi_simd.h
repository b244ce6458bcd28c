// RoI sampling in vector extensions, compiled once per instruction set by roi_<isa>.cpp, which names EVAD_ISA,
// EVAD_VECTOR_BYTES and EVAD_VECTORS before it includes this file. Everything is in that namespace and no standard
// template is used: code with wide instructions must not leak.
//
// Separable: a row of bins first sums, column by column, the rows of the grid that it touches; a bin is a short sum over
// that line of columns, which stays in the first-level cache. Or columns of bins first, where that is less work.
// EVAD_VECTORS vectors of channels go through in registers.
#include "roi_kernels.h"

#define EVAD_INLINE __attribute__((always_inline)) inline
#define EVAD_INLINE_LAMBDA __attribute__((always_inline))

namespace evad {
namespace EVAD_ISA {
namespace {

template <class F>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(EVAD_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t index __attribute__((vector_size(EVAD_VECTOR_BYTES), aligned(4), may_alias));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(EVAD_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t index __attribute__((vector_size(EVAD_VECTOR_BYTES), aligned(8), may_alias));
};

// N vectors of channels, or one channel.
template <class F, int N>
struct Vectors {
  using V = typename VectorOf<F>::type;
  using I = typename VectorOf<F>::index;
  static constexpr int64_t kLanes = EVAD_VECTOR_BYTES / static_cast<int64_t>(sizeof(F));
  static constexpr int64_t kChannels = N * kLanes;
  static constexpr int kCount = N;
  static EVAD_INLINE V load(const F* p) { return *reinterpret_cast<const V*>(p); }
  static EVAD_INLINE void store(F* p, V v) { *reinterpret_cast<V*>(p) = v; }
  static EVAD_INLINE V splat(F x) { return x - V{}; }
  static EVAD_INLINE V larger(V x, V y) { return x > y ? x : y; }
  static EVAD_INLINE I splat_index(int64_t x) { return static_cast<decltype(I{}[0] + 0)>(x) - I{}; }
  static EVAD_INLINE F total(V x) {
    F sum = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += x[lane];
    return sum;
  }
  // Exact: a NaN is the largest. Ascending: bins come in order; else the lower of equal ones has to be asked for.
  template <bool Exact, bool Ascending>
  static EVAD_INLINE void keep(V v, I bin, V& best, I& index) {
    I take = Exact ? (best == best) & ~(v <= best) : v > best;
    if (!Ascending) take |= (Exact ? (v == best) | ((v != v) & (best != best)) : v == best) & (bin < index);
    best = take ? v : best;
    index = take ? bin : index;
  }
  static EVAD_INLINE void store_index(int32_t* p, I index) {
    for (int64_t lane = 0; lane < kLanes; ++lane) p[lane] = static_cast<int32_t>(index[lane]);
  }
};
template <class F>
struct Vectors<F, 0> {
  using V = F;
  using I = int32_t;
  static constexpr int64_t kLanes = 1, kChannels = 1;
  static constexpr int kCount = 1;
  static EVAD_INLINE V load(const F* p) { return *p; }
  static EVAD_INLINE void store(F* p, V v) { *p = v; }
  static EVAD_INLINE V splat(F x) { return x; }
  static EVAD_INLINE V larger(V x, V y) { return x > y ? x : y; }
  static EVAD_INLINE I splat_index(int64_t x) { return static_cast<I>(x); }
  static EVAD_INLINE F total(V x) { return x; }
  template <bool Exact, bool Ascending>
  static EVAD_INLINE void keep(V v, I bin, V& best, I& index) {
    bool take = Exact ? best == best && !(v <= best) : v > best;
    if (!Ascending) take |= (Exact ? v == best || (v != v && best != best) : v == best) && bin < index;
    best = take ? v : best;
    index = take ? bin : index;
  }
  static EVAD_INLINE void store_index(int32_t* p, I index) { *p = index; }
};

// Calls body(vectors, c) over channels [0, count).
template <class F, class Body>
EVAD_INLINE void for_channels(int64_t count, const Body& body) {
  int64_t c = 0;
  for (; c + Vectors<F, EVAD_VECTORS>::kChannels <= count; c += Vectors<F, EVAD_VECTORS>::kChannels)
    body(Vectors<F, EVAD_VECTORS>{}, c);
  for (; c + Vectors<F, 1>::kChannels <= count; c += Vectors<F, 1>::kChannels) body(Vectors<F, 1>{}, c);
  for (; c < count; ++c) body(Vectors<F, 0>{}, c);
}

// One axis of a box, and how far apart its cells and its bins lie.
template <class F>
struct Side {
  RoiAxis<F> axis;
  int64_t bins, cell_step, bin_step;
};

// line[i] = the sum over `taps` of cells that are beside cell i of the other axis.
template <class L, int Taps, class F>
void sum_beside(const RoiTap<F>* tap, int64_t taps, int64_t tap_step, const RoiAxis<F>& other, int64_t other_step,
                const F* const* cell, int64_t begin, F* __restrict line) {
  using V = typename L::V;
  if (Taps) taps = Taps;
  for (int32_t i = 0; i < other.cells; ++i, line += L::kChannels) {
    const F* const* const beside = cell + other.cell[i] * other_step;
    V sum[L::kCount] = {};
#pragma GCC unroll 4
    for (int64_t k = 0; k < taps; ++k) {
      const F* const from = beside[tap[k].cell * tap_step] + begin;
      const V weight = L::splat(tap[k].weight);
#pragma GCC unroll 4
      for (int v = 0; v < L::kCount; ++v) sum[v] += weight * L::load(from + v * L::kLanes);
    }
#pragma GCC unroll 4
    for (int v = 0; v < L::kCount; ++v) L::store(line + v * L::kLanes, sum[v]);
  }
}

template <class F>
EVAD_INLINE int64_t multiplications(const RoiAxis<F>& first, int64_t bins, const RoiAxis<F>& second, int64_t others) {
  return first.begin[bins] * second.cells + bins * second.begin[others];
}

// Whether rows of bins are less work than columns of bins. The same for all channels and for inference as for training.
template <class F>
EVAD_INLINE bool by_rows(const RoiShape& shape, const RoiBox<F>& box) {
  return multiplications(box.rows, shape.oh, box.columns, shape.ow) <=
         multiplications(box.columns, shape.ow, box.rows, shape.oh);
}

// Calls body(bin, sum[]) for every bin of the box, row by row or column by column of bins; `begin` is the first of the
// channels.
template <class L, class F, class Body>
EVAD_INLINE void for_bins(bool by_rows, const RoiShape& shape, const RoiBox<F>& box, const F* const* cell,
                          int64_t begin, F* __restrict line, const Body& body) {
  using V = typename L::V;
  const Side<F> rows{box.rows, shape.oh, shape.Gw, shape.ow}, columns{box.columns, shape.ow, 1, 1};
  const Side<F>& first = by_rows ? rows : columns;
  const Side<F>& second = by_rows ? columns : rows;
  for (int64_t p = 0; p < first.bins; ++p) {
    const RoiTap<F>* const tap = first.axis.tap + first.axis.begin[p];
    const int64_t taps = first.axis.begin[p + 1] - first.axis.begin[p];
    const auto sum_line = taps == 1   ? sum_beside<L, 1, F>
                          : taps == 2 ? sum_beside<L, 2, F>
                          : taps == 3 ? sum_beside<L, 3, F>
                          : taps == 4 ? sum_beside<L, 4, F>
                                      : sum_beside<L, 0, F>;
    sum_line(tap, taps, first.cell_step, second.axis, second.cell_step, cell, begin, line);
    const RoiTap<F>* beside = second.axis.tap;
    for (int64_t q = 0; q < second.bins; ++q) {
      const RoiTap<F>* const end = second.axis.tap + second.axis.begin[q + 1];
      V sum[L::kCount] = {};
      for (; beside != end; ++beside) {
        const F* const from = line + beside->ordinal * L::kChannels;
        const V weight = L::splat(beside->weight);
#pragma GCC unroll 4
        for (int v = 0; v < L::kCount; ++v) sum[v] += weight * L::load(from + v * L::kLanes);
      }
      body(p * first.bin_step + q * second.bin_step, sum);
    }
  }
}

template <class F>
void bins(const RoiShape& shape, const RoiBox<F>& box, const F* const* cell, int64_t begin, int64_t count, F* samples,
          F* workspace) {
  for_channels<F>(count, [&](auto vectors, int64_t c) EVAD_INLINE_LAMBDA {
    using L = decltype(vectors);
    using Sum = const typename L::V*;
    for_bins<L>(by_rows(shape, box), shape, box, cell, begin + c, workspace, [&](int64_t bin, Sum sum) EVAD_INLINE_LAMBDA {
#pragma GCC unroll 4
      for (int v = 0; v < L::kCount; ++v) L::store(samples + bin * count + c + v * L::kLanes, sum[v]);
    });
  });
}

// Exact: there may be a NaN, which is the largest. Index: tell the bin. Inexact, the result is false, and nothing is
// written, where a bin is not finite: the sum of the bins tells that for an addition a bin.
template <class L, bool Exact, bool Index, bool ByRows, class F>
EVAD_INLINE bool largest_of(const RoiShape& shape, const RoiBox<F>& box, const F* const* cell, int64_t begin, F* sum,
                            int32_t* index, F* workspace) {
  using V = typename L::V;
  using I = typename L::I;
  V best[L::kCount], total = {};
  I which[L::kCount] = {};
#pragma GCC unroll 4
  for (int v = 0; v < L::kCount; ++v) best[v] = L::splat(static_cast<F>(-__builtin_inf()));
  for_bins<L>(ByRows, shape, box, cell, begin, workspace, [&](int64_t bin, const V* value) EVAD_INLINE_LAMBDA {
    const I this_bin = L::splat_index(bin);
    if (!Exact) {  // one addition a bin waits for the bin before
      V sum = value[0];
#pragma GCC unroll 4
      for (int v = 1; v < L::kCount; ++v) sum += value[v];
      total += sum;
    }
#pragma GCC unroll 4
    for (int v = 0; v < L::kCount; ++v) {
      if (!Exact && !Index)
        best[v] = L::larger(value[v], best[v]);
      else
        L::template keep<Exact, ByRows>(value[v], this_bin, best[v], which[v]);
    }
  });
  if (!Exact && !(L::total(total * 0) == 0)) return false;
#pragma GCC unroll 4
  for (int v = 0; v < L::kCount; ++v) {
    F* const to = sum + v * L::kLanes;
    L::store(to, L::load(to) + best[v]);
    if (Index) L::store_index(index + v * L::kLanes, which[v]);
  }
  return true;
}

template <class L, bool Index, bool ByRows, class F>
void largest_of(const RoiShape& shape, const RoiBox<F>& box, const F* const* cell, int64_t begin, F* sum,
                            int32_t* index, F* workspace) {
  if (!largest_of<L, false, Index, ByRows>(shape, box, cell, begin, sum, index, workspace))
    largest_of<L, true, Index, ByRows>(shape, box, cell, begin, sum, index, workspace);
}

template <class F>
void largest(const RoiShape& shape, const RoiBox<F>& box, const F* const* cell, int64_t begin, int64_t count, F* sum,
             int32_t* index, F* workspace) {
  const bool rows = by_rows(shape, box);
  for_channels<F>(count, [&](auto vectors, int64_t c) EVAD_INLINE_LAMBDA {
    using L = decltype(vectors);
    const auto of = index ? rows ? largest_of<L, true, true, F> : largest_of<L, true, false, F>
                    : rows ? largest_of<L, false, true, F> : largest_of<L, false, false, F>;
    of(shape, box, cell, begin + c, sum + c, index ? index + c : nullptr, workspace);
  });
}

template <class F>
void grad_bins(const RoiShape& shape, const RoiBox<F>& box, const F* grad_samples, int64_t count, F* grad_cells,
               F* workspace) {
  for_channels<F>(count, [&](auto vectors, int64_t c) EVAD_INLINE_LAMBDA {
    using L = decltype(vectors);
    using V = typename L::V;
    const int64_t row_size = shape.ow * L::kChannels;
    int32_t rows = 0;  // ordinals met so far
    for (int64_t p = 0; p < shape.oh; ++p)
      for (int32_t j = box.rows.begin[p]; j < box.rows.begin[p + 1]; ++j) {
        const RoiTap<F>& row = box.rows.tap[j];
        F* const to = workspace + row.ordinal * row_size;
        const bool fresh = row.ordinal >= rows;
        if (fresh) rows = row.ordinal + 1;
        const V weight = L::splat(row.weight);
        for (int64_t q = 0; q < shape.ow; ++q) {
          const F* const from = grad_samples + (p * shape.ow + q) * count + c;
#pragma GCC unroll 4
          for (int v = 0; v < L::kCount; ++v) {
            F* const sum = to + q * L::kChannels + v * L::kLanes;
            const V grad = weight * L::load(from + v * L::kLanes);
            L::store(sum, fresh ? grad : L::load(sum) + grad);
          }
        }
      }
    int32_t done = 0;
    for (int32_t j = box.rows.begin[0]; j < box.rows.begin[shape.oh]; ++j) {
      const RoiTap<F>& row = box.rows.tap[j];
      if (row.ordinal < done) continue;
      done = row.ordinal + 1;
      const F* const from = workspace + row.ordinal * row_size;
      F* const in_row = grad_cells + row.cell * shape.Gw * count + c;
      for (int64_t q = 0; q < shape.ow; ++q) {
        V grad[L::kCount];
#pragma GCC unroll 4
        for (int v = 0; v < L::kCount; ++v) grad[v] = L::load(from + q * L::kChannels + v * L::kLanes);
        for (int32_t i = box.columns.begin[q]; i < box.columns.begin[q + 1]; ++i) {
          const RoiTap<F>& column = box.columns.tap[i];
          F* const to = in_row + column.cell * count;
          const V weight = L::splat(column.weight);
#pragma GCC unroll 4
          for (int v = 0; v < L::kCount; ++v)
            L::store(to + v * L::kLanes, L::load(to + v * L::kLanes) + weight * grad[v]);
        }
      }
    }
  });
}

// A square of kLanes x kLanes in registers: step s swaps the quarters of every 2s x 2s square.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define EVAD_REGISTER_TRANSPOSE
#endif
#endif
#if defined(EVAD_REGISTER_TRANSPOSE)
template <int... Lane>
struct Lanes {};
template <int N, int... Lane>
struct LanesTo : LanesTo<N - 1, N - 1, Lane...> {};
template <int... Lane>
struct LanesTo<0, Lane...> {
  using type = Lanes<Lane...>;
};

template <int S, class V, int... Lane>
EVAD_INLINE void swap_quarters(V& upper, V& lower, Lanes<Lane...>) {
  constexpr int N = sizeof...(Lane);
  const V a = upper, b = lower;
  upper = __builtin_shufflevector(a, b, ((Lane & S) ? N + Lane - S : Lane)...);
  lower = __builtin_shufflevector(a, b, ((Lane & S) ? N + Lane : Lane + S)...);
}

template <int S, int N, class V>
EVAD_INLINE void swap_all_quarters(V* row) {
  if constexpr (S < N) {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i)
      if (!(i & S)) swap_quarters<S>(row[i], row[i + S], typename LanesTo<N>::type{});
    swap_all_quarters<2 * S, N>(row);
  }
}
#endif

template <class F>
void transpose(const F* from, int64_t from_stride, int64_t rows, int64_t columns, F* to, int64_t to_stride) {
  int64_t whole_rows = 0, whole_columns = 0;
#if defined(EVAD_REGISTER_TRANSPOSE)
  using L = Vectors<F, 1>;
  constexpr int N = static_cast<int>(L::kLanes);
  whole_rows = rows / N * N, whole_columns = columns / N * N;
  for (int64_t r = 0; r < whole_rows; r += N)
    for (int64_t c = 0; c < whole_columns; c += N) {
      typename L::V row[N];
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) row[i] = L::load(from + (r + i) * from_stride + c);
      swap_all_quarters<1, N>(row);
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) L::store(to + (c + i) * to_stride + r, row[i]);
    }
#endif
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = c < whole_columns ? whole_rows : 0; r < rows; ++r)
      to[c * to_stride + r] = from[r * from_stride + c];
}

}  // namespace

template <class F>
RoiKernels<F> roi_kernels() {
  return {Vectors<F, EVAD_VECTORS>::kChannels, bins<F>, largest<F>, grad_bins<F>, transpose<F>};
}
template RoiKernels<float> roi_kernels<float>();
template RoiKernels<double> roi_kernels<double>();

}  // namespace EVAD_ISA
}  // namespace evad
