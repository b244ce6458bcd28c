// The kernels of keyframe attention in vector extensions, compiled once per instruction set by
// keyframe_attention_<isa>.cpp, which names EVAD_ISA, EVAD_VECTOR_BYTES and EVAD_VECTORS before it includes this file.
// Everything is in that namespace and no standard template is used: code with wide instructions must not leak.
//
// A block of 24 rows at a time: logits of the whole row by panels of packed K^T, exp2 in place, column sums, then times
// V. One microkernel does every product: 6 rows x EVAD_VECTORS vectors stay in registers, the left factor is broadcast.
// Logits are kept in base 2 (scale * log2 e folded in after the product), so that exp2 needs no range constants. Packed
// halves stay halves: widening them costs less than twice the cache.
#include "keyframe_attention.h"
#include "keyframe_attention_kernels.h"

#if EVAD_VECTOR_BYTES > 16
#include <immintrin.h>
#endif

#define EVAD_INLINE __attribute__((always_inline)) inline

namespace evad {
namespace EVAD_ISA {
namespace {

constexpr int64_t kRows = 6;              // of the microkernel
constexpr int64_t kBlock = 4 * kRows;     // rows of logits in the workspace; fp32 sums run this far, fp64 beyond
constexpr int64_t kVectors = EVAD_VECTORS;
constexpr int64_t kDepth = 128;           // rows of V or K that stay in the first-level cache

template <class C>
struct Vectors;
template <>
struct Vectors<float> {
  typedef float type __attribute__((vector_size(EVAD_VECTOR_BYTES), may_alias));
  typedef uint32_t bits __attribute__((vector_size(EVAD_VECTOR_BYTES), may_alias));
  // Adding 1.5 * 2^23 rounds to an integer, and the exponent's bias makes its lowest bits the exponent of 2^that.
  static constexpr float kRound = 12582912.0f + 127, kLowest = -126.0f;
  static constexpr int kMantissa = 23;
};
template <>
struct Vectors<double> {
  typedef double type __attribute__((vector_size(EVAD_VECTOR_BYTES), may_alias));
  typedef uint64_t bits __attribute__((vector_size(EVAD_VECTOR_BYTES), may_alias));
  static constexpr double kRound = 6755399441055744.0 + 1023, kLowest = -1022.0;
  static constexpr int kMantissa = 52;
};
template <class C>
using Vector = typename Vectors<C>::type;
template <class C>
constexpr int64_t kWidth = EVAD_VECTOR_BYTES / static_cast<int64_t>(sizeof(C));

constexpr int64_t round_up(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

template <class C>
EVAD_INLINE Vector<C> load(const C* p) {
  return *reinterpret_cast<const Vector<C>*>(p);
}
// kWidth<float> halves, aligned to their size.
#if EVAD_VECTOR_BYTES == 64
EVAD_INLINE Vector<float> load(const bfloat16* p) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
EVAD_INLINE Vector<float> load(const float16* p) {
  return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(p)));
}
#elif EVAD_VECTOR_BYTES == 32
EVAD_INLINE Vector<float> load(const bfloat16* p) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}
EVAD_INLINE Vector<float> load(const float16* p) {
  return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
}
#endif
template <class C>
EVAD_INLINE void store(C* p, Vector<C> v) {
  *reinterpret_cast<Vector<C>*>(p) = v;
}
// What a right factor of type T is packed as: as it is, where a load can widen it.
#if EVAD_VECTOR_BYTES > 16
template <class T>
using packed_t = T;
#else
template <class T>
using packed_t = accumulate_t<T>;
EVAD_INLINE void pack(float16 x, float& to) { to = to_float(x); }
EVAD_INLINE void pack(bfloat16 x, float& to) { to = to_float(x); }
#endif
template <class T>
EVAD_INLINE void pack(T x, T& to) {
  to = x;
}

template <class C>
EVAD_INLINE Vector<C> splat(C x) {
  return x - Vector<C>{};
}

// A NaN operand never replaces m: the sum of the row finds it.
template <class C>
EVAD_INLINE Vector<C> larger(Vector<C> x, Vector<C> m) {
  return x > m ? x : m;
}
template <class C>
EVAD_INLINE C largest(Vector<C> v) {
  C m = v[0];
  for (int64_t i = 1; i < kWidth<C>; ++i) m = v[i] > m ? v[i] : m;
  return m;
}
template <class C>
EVAD_INLINE C total(Vector<C> v) {
  double sum = 0;
  for (int64_t i = 0; i < kWidth<C>; ++i) sum += v[i];
  return static_cast<C>(sum);
}

// 2^x for x not above 127; below the smallest normal number it is 0. NaN stays.
template <class C>
EVAD_INLINE Vector<C> exp2(Vector<C> x) {
  using Bits = typename Vectors<C>::bits;
  const Vector<C> shifted = x + Vectors<C>::kRound;
  const Vector<C> fraction = x - (shifted - Vectors<C>::kRound);
  const Bits power = reinterpret_cast<Bits>(shifted) << Vectors<C>::kMantissa;
  const Vector<C> y = exp2_polynomial(fraction, C()) * reinterpret_cast<Vector<C>>(power);
  return x < Vectors<C>::kLowest ? Vector<C>{} : y;
}

EVAD_INLINE float log2_of(float x) { return __builtin_log2f(x); }
EVAD_INLINE double log2_of(double x) { return __builtin_log2(x); }

// Calls body(Count<NV>{}, first column) for each panel of kVectors vectors; the last one may be narrower.
template <int N>
struct Count {
  static constexpr int value = N;
};
template <class C, class Body>
EVAD_INLINE void for_panels(int64_t columns, const Body& body) {
  constexpr int64_t panel = kVectors * kWidth<C>;
  int64_t column = 0;
  for (; column + panel <= columns; column += panel) body(Count<kVectors>{}, column);
  const int64_t rest = (columns - column) / kWidth<C>;
  if (rest == 1) body(Count<1>{}, column);
  if (kVectors > 2 && rest == 2) body(Count<2>{}, column);
  if (kVectors > 3 && rest == 3) body(Count<3>{}, column);
}

// sum[m][v] += sum_k a[k, m] * b[k, v]: k-th left elements at a + k * a_k + m * a_m, k-th right vectors at b + k * b_k.
template <class C, int NV, class P>
EVAD_INLINE void multiply(Vector<C> (&sum)[kRows][NV], const C* a, int64_t a_k, int64_t a_m, const P* b, int64_t b_k,
                          int64_t depth) {
  for (int64_t k = 0; k < depth; ++k, a += a_k, b += b_k) {
    Vector<C> right[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) right[v] = load(b + v * kWidth<C>);
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
      const C left = a[m * a_m];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[m][v] += left * right[v];
    }
  }
}

// c[m, :] += the same product; c has rows of c_m elements.
template <class C, int NV, class P>
EVAD_INLINE void multiply_add(C* c, int64_t c_m, const C* a, int64_t a_k, int64_t a_m, const P* b, int64_t b_k,
                              int64_t depth) {
  Vector<C> sum[kRows][NV];
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[m][v] = load(c + m * c_m + v * kWidth<C>);
  multiply<C, NV>(sum, a, a_k, a_m, b, b_k, depth);
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(c + m * c_m + v * kWidth<C>, sum[m][v]);
}

// Rows of x [rows, D] as panels: [columns / panel][rows][panel], zeros beyond D.
template <class C, class T, class P>
void pack_rows(const T* x, int64_t stride, int64_t rows, int64_t D, P* packed) {
  for_panels<C>(round_up(D, kWidth<C>), [&](auto count, int64_t column) {
    constexpr int64_t width = decltype(count)::value * kWidth<C>;
    P* to = packed + column * rows;
    const int64_t filled = D - column < width ? D - column : width;
    for (int64_t r = 0; r < rows; ++r, to += width) {
      const T* from = x + r * stride + column;
      if (filled == width) {
        for (int64_t d = 0; d < width; ++d) pack(from[d], to[d]);
        continue;
      }
      for (int64_t d = 0; d < filled; ++d) pack(from[d], to[d]);
      for (int64_t d = filled; d < width; ++d) to[d] = P{};
    }
  });
}

// x [N, D] transposed, as panels of columns: [N / panel][D][panel], zeros beyond N.
template <class C, class T, class P>
void pack_transposed(const T* x, int64_t stride, int64_t N, int64_t D, P* packed) {
  for_panels<C>(round_up(N, kWidth<C>), [&](auto count, int64_t column) {
    constexpr int64_t width = decltype(count)::value * kWidth<C>;
    P* to = packed + column * D;
    const int64_t filled = N - column < width ? N - column : width;
    for (int64_t j = 0; j < width; j += kWidth<C>)
      for (int64_t d = 0; d < D; ++d) {
        const T* from = x + (column + j) * stride + d;
        P lane[kWidth<C>] = {};
        if (j + kWidth<C> <= filled)
          for (int64_t i = 0; i < kWidth<C>; ++i) pack(from[i * stride], lane[i]);
        else
          for (int64_t i = 0; j + i < filled; ++i) pack(from[i * stride], lane[i]);
        __builtin_memcpy(to + d * width + j, lane, sizeof lane);
      }
  });
}

// rows [kBlock, padded D] from row(r), zeros for null and beyond D.
template <class C, class T, class Row>
EVAD_INLINE void copy_rows(const Row& row, int64_t D, C* rows) {
  const int64_t padded_D = round_up(D, kWidth<C>);
  for (int64_t r = 0; r < kBlock; ++r, rows += padded_D) {
    const T* from = row(r);
    const int64_t filled = from ? D : 0;
    for (int64_t d = 0; d < filled; ++d) rows[d] = to_float(from[d]);
    for (int64_t d = filled; d < padded_D; ++d) rows[d] = 0;
  }
}

// A row of the block of logits: room for whole vectors and whole groups of kRows; two rows are never a multiple of
// the page size apart.
template <class C>
int64_t logit_stride(int64_t N) {
  const int64_t padded = round_up(N, kWidth<C>) + kWidth<C>;
  return padded * static_cast<int64_t>(sizeof(C)) % 512 == 0 ? padded + kWidth<C> : padded;
}

// Hands out consecutive 64-byte aligned arrays; with a null base it only measures.
struct Carve {
  char* base;
  size_t used = 0;
  template <class C>
  C* take(int64_t count) {
    C* p = reinterpret_cast<C*>(base + used);
    used += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(C)), 64));
    return p;
  }
};

template <class C, class P>
struct ForwardWorkspace {
  P *key, *value;       // K^T and V, packed; they outlive the task
  C* query;             // [kBlock, padded D]
  C* logits;            // [kBlock, stride]: logits, then unnormalised probabilities
  C* output;            // [kBlock, padded D]
  C* column;            // [padded N]: the block's column sums
  C *pad, *last_pad;    // a panel of what is added to logits: zeros; -inf beyond N
  Vector<C>* maxima;    // [kBlock]
  size_t bytes;
  ForwardWorkspace(char* base, int64_t N, int64_t D) {
    const int64_t padded_N = round_up(N, kWidth<C>), padded_D = round_up(D, kWidth<C>);
    Carve carve{base};
    key = carve.take<P>(padded_N * D);
    value = carve.take<P>(N * padded_D);
    query = carve.take<C>(kBlock * padded_D);
    logits = carve.take<C>(kBlock * logit_stride<C>(N));
    output = carve.take<C>(kBlock * padded_D);
    column = carve.take<C>(padded_N);
    pad = carve.take<C>(kVectors * kWidth<C>);
    last_pad = carve.take<C>(kVectors * kWidth<C>);
    maxima = carve.take<Vector<C>>(kBlock);
    bytes = carve.used;
  }
};

template <class T>
size_t forward_workspace(int64_t N, int64_t D) {
  return ForwardWorkspace<accumulate_t<T>, packed_t<T>>(nullptr, N, D).bytes;
}

template <class C>
void fill_pads(int64_t N, C* pad, C* last_pad) {
  constexpr int64_t panel = kVectors * kWidth<C>;
  const int64_t last = (round_up(N, kWidth<C>) - 1) / panel * panel;
  for (int64_t j = 0; j < panel; ++j) {
    pad[j] = 0;
    last_pad[j] = last + j < N ? C(0) : -static_cast<C>(__builtin_inf());
  }
}

// logits [kBlock, stride] = scale * left right^T + pad (last_pad in the last panel), and the running maximum of each
// row where wanted.
template <bool kMaxima, class C, class P>
void block_logits(const C* left, const P* right, int64_t N, int64_t D, C scale, const C* pad, const C* last_pad,
                  C* logits, int64_t stride, Vector<C>* maxima) {
  const int64_t columns = round_up(N, kWidth<C>), padded_D = round_up(D, kWidth<C>);
  // Read anew after each product: a register for it would put one of the product's sixteen on the stack.
  const volatile C scale_in_memory = scale;
  for_panels<C>(columns, [&](auto count, int64_t column) {
    constexpr int NV = decltype(count)::value;
    const C* add = column + NV * kWidth<C> == columns ? last_pad : pad;
    for (int64_t group = 0; group < kBlock; group += kRows) {
      Vector<C> sum[kRows][NV] = {};
      multiply<C, NV>(sum, left + group * padded_D, 1, padded_D, right + column * D, NV * kWidth<C>, D);
      const C scale_now = scale_in_memory;
#pragma GCC unroll 6
      for (int m = 0; m < kRows; ++m) {
        Vector<C> largest_yet = kMaxima ? maxima[group + m] : Vector<C>{};
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          const Vector<C> logit = sum[m][v] * scale_now + load(add + v * kWidth<C>);
          store(logits + (group + m) * stride + column + v * kWidth<C>, logit);
          if (kMaxima) largest_yet = larger<C>(logit, largest_yet);
        }
        if (kMaxima) maxima[group + m] = largest_yet;
      }
    }
  });
}

// Rows of a right factor as pack_rows has them; those wanted begin with row `first` of the `rows` in each panel.
template <class P>
struct PackedRows {
  const P* panels;
  int64_t rows, first;
};

// output [kBlock, padded D] = left [kBlock, N] times the rows that right(begin, end) gives for each run of columns of
// left, just before their product, which then finds in the first-level cache what that has touched.
template <class C, class Right>
EVAD_INLINE void block_product(const C* left, int64_t stride, int64_t N, int64_t D, C* output, const Right& right) {
  const int64_t columns = round_up(D, kWidth<C>);
  for (int64_t i = 0; i < kBlock * columns; i += kWidth<C>) store(output + i, Vector<C>{});
  for (int64_t j = 0; j < N; j += kDepth) {
    const int64_t depth = N - j < kDepth ? N - j : kDepth;
    const auto packed = right(j, j + depth);
    for_panels<C>(columns, [&](auto count, int64_t column) {
      constexpr int NV = decltype(count)::value;
      constexpr int64_t width = NV * kWidth<C>;
      for (int64_t group = 0; group < kBlock; group += kRows)
        multiply_add<C, NV>(output + group * columns + column, columns, left + group * stride + j, 1, stride,
                            packed.panels + column * packed.rows + packed.first * width, width, depth);
    });
  }
}

template <class T>
void forward(const AttentionForwardTask& t, char* workspace) {
  using C = accumulate_t<T>;
  const ForwardWorkspace<C, packed_t<T>> w(workspace, t.N, t.D);
  const int64_t stride = logit_stride<C>(t.N), columns = round_up(t.N, kWidth<C>), padded_D = round_up(t.D, kWidth<C>);
  const C scale = static_cast<C>(t.scale * kLog2E), keyframe_weight = static_cast<C>(t.keyframe_weight);
  if (!t.same_head) {
    pack_transposed<C>(static_cast<const T*>(t.key), t.key_stride, t.N, t.D, w.key);
    pack_rows<C>(static_cast<const T*>(t.value), t.value_stride, t.N, t.D, w.value);
    fill_pads<C>(t.N, w.pad, w.last_pad);
  }
  const int64_t M = t.column_sum ? t.N - t.num_keyframe : 0;
  for (int64_t j = 0; j < M; ++j) t.column_sum[j] = 0;

  for (int64_t begin = t.row_begin; begin < t.row_end; begin += kBlock) {
    const int64_t count = t.row_end - begin < kBlock ? t.row_end - begin : kBlock;
    const auto row = [&](int64_t r) {
      return r < count ? static_cast<const T*>(t.query) + (begin + r) * t.query_stride : nullptr;
    };
    copy_rows<C, T>(row, t.D, w.query);
    for (int64_t r = 0; r < kBlock; ++r) w.maxima[r] = splat(-static_cast<C>(__builtin_inf()));
    block_logits<true>(w.query, w.key, t.N, t.D, scale, w.pad, w.last_pad, w.logits, stride, w.maxima);

    C inverse[kBlock], factor[kBlock];
    for (int64_t r = 0; r < count; ++r) {
      C* p = w.logits + r * stride;
      const C maximum = largest<C>(w.maxima[r]);
      Vector<C> sum = {};
      for (int64_t j = 0; j < columns; j += kWidth<C>) {
        const Vector<C> probability = exp2<C>(load(p + j) - maximum);
        store(p + j, probability);
        sum += probability;
      }
      const C row_sum = total<C>(sum);
      inverse[r] = 1 / row_sum;
      factor[r] = inverse[r] * row_weight(begin + r, t.num_keyframe, keyframe_weight);
      static_cast<C*>(t.lse)[begin + r] = (maximum + log2_of(row_sum)) * static_cast<C>(kLn2);
    }

    block_product<C>(w.logits, stride, t.N, t.D, w.output, [&](int64_t begin_column, int64_t end) {
      const int64_t summed = t.num_keyframe / kWidth<C> * kWidth<C>;
      for (int64_t j = begin_column < summed ? summed : begin_column; M > 0 && j < end; j += kWidth<C>) {
        Vector<C> sum = {};
        for (int64_t r = 0; r < count; ++r) sum += load(w.logits + r * stride + j) * factor[r];
        store(w.column + j, sum);
      }
      return PackedRows<packed_t<T>>{w.value, t.N, begin_column};
    });
    for (int64_t j = 0; j < M; ++j) t.column_sum[j] += w.column[t.num_keyframe + j];
    for (int64_t r = 0; r < count; ++r) {
      T* to = static_cast<T*>(t.output) + (begin + r) * t.output_stride;
      for (int64_t d = 0; d < t.D; ++d) to[d] = from_float<T>(w.output[r * padded_D + d] * inverse[r]);
    }
  }
}

template <class C, class P>
struct BackwardWorkspace {
  // Packing them again for each block of rows costs a tenth of the time in float32, and nothing that shows in halves.
  static constexpr bool kAllKeyRows = sizeof(P) == sizeof(C);
  P *key, *value;                        // K^T and V^T, packed
  P* key_rows;                           // K, packed: [N, padded D], or [kDepth, padded D] at a time
  C *grad_key, *grad_value;              // [N rounded up to kRows, padded D]
  C *query, *grad_output, *grad_query;   // [kBlock, padded D]
  C *logits, *grad;                      // [kBlock, stride]: probabilities; their gradient, then that of the logits
  C* importance;                         // [padded N]: grad_importance, zero for the keyframe's columns
  C *pad, *last_pad;
  size_t bytes;
  BackwardWorkspace(char* base, int64_t N, int64_t D) {
    const int64_t padded_N = round_up(N, kWidth<C>), padded_D = round_up(D, kWidth<C>);
    Carve carve{base};
    key = carve.take<P>(padded_N * D);
    value = carve.take<P>(padded_N * D);
    key_rows = carve.take<P>((kAllKeyRows ? N : kDepth) * padded_D);
    grad_key = carve.take<C>(round_up(N, kRows) * padded_D);
    grad_value = carve.take<C>(round_up(N, kRows) * padded_D);
    query = carve.take<C>(kBlock * padded_D);
    grad_output = carve.take<C>(kBlock * padded_D);
    grad_query = carve.take<C>(kBlock * padded_D);
    // The microkernel reads whole groups of kRows columns.
    logits = carve.take<C>(kBlock * logit_stride<C>(N) + kRows);
    grad = carve.take<C>(kBlock * logit_stride<C>(N) + kRows);
    importance = carve.take<C>(padded_N);
    pad = carve.take<C>(kVectors * kWidth<C>);
    last_pad = carve.take<C>(kVectors * kWidth<C>);
    bytes = carve.used;
  }
};

template <class T>
size_t backward_workspace(int64_t N, int64_t D) {
  return BackwardWorkspace<accumulate_t<T>, packed_t<T>>(nullptr, N, D).bytes;
}

// sum [N, padded D] += left^T right: left [count, stride], right [count, padded D].
template <class C>
void add_transposed_product(const C* left, int64_t stride, const C* right, int64_t count, int64_t N, int64_t D,
                            C* sum) {
  const int64_t columns = round_up(D, kWidth<C>);
  for (int64_t j = 0; j < N; j += kRows)
    for_panels<C>(columns, [&](auto panel, int64_t column) {
      multiply_add<C, decltype(panel)::value>(sum + j * columns + column, columns, left + j, stride, 1, right + column,
                                              columns, count);
    });
}

template <class T, class C>
void write_rows(const C* rows, int64_t N, int64_t D, T* to, int64_t stride) {
  const int64_t padded_D = round_up(D, kWidth<C>);
  for (int64_t n = 0; n < N; ++n)
    for (int64_t d = 0; d < D; ++d) to[n * stride + d] = from_float<T>(rows[n * padded_D + d]);
}

template <class T>
void backward(const AttentionBackwardTask& t, char* workspace) {
  using C = accumulate_t<T>;
  using Workspace = BackwardWorkspace<C, packed_t<T>>;
  const Workspace w(workspace, t.N, t.D);
  const int64_t stride = logit_stride<C>(t.N), columns = round_up(t.N, kWidth<C>), padded_D = round_up(t.D, kWidth<C>);
  const C scale = static_cast<C>(t.scale), keyframe_weight = static_cast<C>(t.keyframe_weight);
  pack_transposed<C>(static_cast<const T*>(t.key), t.key_stride, t.N, t.D, w.key);
  pack_transposed<C>(static_cast<const T*>(t.value), t.value_stride, t.N, t.D, w.value);
  if (Workspace::kAllKeyRows) pack_rows<C>(static_cast<const T*>(t.key), t.key_stride, t.N, t.D, w.key_rows);
  fill_pads<C>(t.N, w.pad, w.last_pad);
  for (int64_t i = 0; i < round_up(t.N, kRows) * padded_D; ++i) w.grad_key[i] = w.grad_value[i] = 0;
  for (int64_t j = 0; j < columns; ++j)
    w.importance[j] = t.grad_importance && j >= t.num_keyframe && j < t.N
                          ? static_cast<const C*>(t.grad_importance)[j - t.num_keyframe]
                          : C(0);
  T* grad_query = static_cast<T*>(t.grad_query);
  for (int64_t n = 0, r = 0; n < t.N; ++n)
    if (r < t.R && t.row[r] == n)
      ++r;
    else
      for (int64_t d = 0; d < t.D; ++d) grad_query[n * t.grad_query_stride + d] = from_float<T>(C(0));

  for (int64_t begin = 0; begin < t.R; begin += kBlock) {
    const int64_t count = t.R - begin < kBlock ? t.R - begin : kBlock;
    const auto query = [&](int64_t r) {
      return r < count ? static_cast<const T*>(t.query) + t.row[begin + r] * t.query_stride : nullptr;
    };
    const auto grad_output = [&](int64_t r) {
      const bool given = r < count && t.grad_output && t.slot[begin + r] >= 0;
      return given ? static_cast<const T*>(t.grad_output) + t.slot[begin + r] * t.grad_output_stride : nullptr;
    };
    copy_rows<C, T>(query, t.D, w.query);
    copy_rows<C, T>(grad_output, t.D, w.grad_output);
    Vector<C> maxima[kBlock];
    for (int64_t r = 0; r < kBlock; ++r) maxima[r] = splat(-static_cast<C>(__builtin_inf()));
    block_logits<true>(w.query, w.key, t.N, t.D, static_cast<C>(t.scale * kLog2E), w.pad, w.last_pad, w.logits,
                          stride, maxima);
    if (t.grad_output)
      block_logits<false>(w.grad_output, w.value, t.N, t.D, C(1), w.pad, w.pad, w.grad, stride, nullptr);
    else  // a product of zero and NaN is not wanted
      for (int64_t i = 0; i < kBlock * stride; i += kWidth<C>) store(w.grad + i, Vector<C>{});

    for (int64_t r = 0; r < count; ++r) {
      C *p = w.logits + r * stride, *grad = w.grad + r * stride;
      const int64_t i = t.row[begin + r];
      // From the maximum, not from the rounded log-sum-exp: where one probability is 1 it must be so exactly, or large
      // logits leave a multiple of the rounding as gradient.
      const C maximum = largest<C>(maxima[r]);
      const C scaled_weight =
          row_weight(i, t.num_keyframe, keyframe_weight) * static_cast<C>(t.importance_scale);
      Vector<C> sum = {}, row_sum = {};
      for (int64_t j = 0; j < columns; j += kWidth<C>) {
        const Vector<C> probability = exp2<C>(load(p + j) - maximum);
        const Vector<C> arriving = grad_probability<Vector<C>>(load(grad + j), load(w.importance + j), scaled_weight);
        store(p + j, probability);
        store(grad + j, arriving);
        sum += probability * arriving;
        row_sum += probability;
      }
      const C inverse = 1 / total<C>(row_sum), row_term = total<C>(sum) * inverse;
      for (int64_t j = 0; j < columns; j += kWidth<C>) {
        const Vector<C> probability = load(p + j) * inverse;
        store(p + j, probability);
        store(grad + j, grad_logit<Vector<C>>(probability, load(grad + j), row_term, scale));
      }
    }

    if (t.grad_output)
      add_transposed_product<C>(w.logits, stride, w.grad_output, count, t.N, t.D, w.grad_value);
    add_transposed_product<C>(w.grad, stride, w.query, count, t.N, t.D, w.grad_key);
    block_product<C>(w.grad, stride, t.N, t.D, w.grad_query, [&](int64_t first, int64_t end) {
      if (Workspace::kAllKeyRows) return PackedRows<packed_t<T>>{w.key_rows, t.N, first};
      pack_rows<C>(static_cast<const T*>(t.key) + first * t.key_stride, t.key_stride, end - first, t.D, w.key_rows);
      return PackedRows<packed_t<T>>{w.key_rows, end - first, 0};
    });
    for (int64_t r = 0; r < count; ++r)
      write_rows<T, C>(w.grad_query + r * padded_D, 1, t.D, grad_query + t.row[begin + r] * t.grad_query_stride, 0);
  }
  write_rows<T, C>(w.grad_key, t.N, t.D, static_cast<T*>(t.grad_key), t.grad_key_stride);
  write_rows<T, C>(w.grad_value, t.N, t.D, static_cast<T*>(t.grad_value), t.grad_value_stride);
}

template <class T>
constexpr AttentionKernels kTable = {forward_workspace<T>, forward<T>, backward_workspace<T>, backward<T>};

}  // namespace

const AttentionKernels* attention_kernels(DType dtype, int64_t) {
  switch (dtype) {
    case DType::float32: return &kTable<float>;
    case DType::float64: return &kTable<double>;
    case DType::float16: return &kTable<float16>;
    case DType::bfloat16: return &kTable<bfloat16>;
  }
  return nullptr;
}

}  // namespace EVAD_ISA
}  // namespace evad
