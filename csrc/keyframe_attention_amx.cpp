// keyframe attention on tiles (AMX) for bfloat16, D up to 256: 16 x 16 products of bfloat16 summed in float.
// Forward, 32 query rows against 32 keys at a time: logits (tiles) > 2^x (vectors) > times V (tiles). Only the float
// probabilities of the 32 rows, 128 N bytes, stay in the second-level cache until their sums are known: then they are
// added, normalised, to the column sum. Backward: 128 query rows against 32 keys, twice: the row terms, the gradients.
// Probabilities and logit gradients enter a product as two bfloat16, high and low: one alone breaks the rule of
// accuracy in 1 % of random cases; with both the results round as the reference's do.
// Taking turns at tile and vector work is as fast as weaving them: near tile work the core runs FMA at half rate.
#include <immintrin.h>
#include <math.h>
#include <stdint.h>

#include "keyframe_attention_kernels.h"

namespace evad {
namespace amx {
namespace {

constexpr int kBlock = 32;          // rows, keys and columns of a block: 2 x 2 tiles
constexpr int kBlockValues = kBlock * kBlock;
constexpr int kTileBytes = 1024;    // 16 rows of 64 bytes
constexpr int kGroup = 2;           // blocks of keys whose probabilities are multiplied with V at once
constexpr int kQueries = 128;       // query rows that the backward handles at once
constexpr int kHalf = kBlock * kBlock * 2;      // bytes of a block of bfloat16
constexpr float kMaxExponent = 32.0f;  // where |logits| are surely below it (log2), the row maximum is not needed
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

template <int T>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void tile_load(const void* data, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(data), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* data, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(data), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
inline void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// Eight full tiles, and denormals flushed as the tile unit flushes them.
class TileMode {
 public:
  TileMode() : control_(_mm_getcsr()) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
    _mm_setcsr(control_ | 0x8040);
  }
  ~TileMode() {
    _mm_setcsr(control_);
    _tile_release();
  }

 private:
  unsigned control_;
};

// Lanes 0 .. count - 1.
inline __mmask32 first_lanes(int64_t count) { return count >= 32 ? ~0u : (1u << count) - 1; }

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// C tiles 0-3 (2 x 2) += [A0; A1] [B0 B1], one contraction step of 32.
inline void dot_2x2(const char* a, int64_t a_stride, const char* b) {
  tile_load<4>(a, a_stride);
  tile_load<6>(b, 64);
  tile_load<7>(b + kTileBytes, 64);
  tile_dot<0, 4, 6>();
  tile_load<5>(a + 16 * a_stride, a_stride);
  tile_dot<1, 4, 7>();
  tile_dot<2, 5, 6>();
  tile_dot<3, 5, 7>();
}
// The same with A = high + low.
inline void dot_2x2(const char* high, const char* low, int64_t a_stride, const char* b) {
  dot_2x2(high, a_stride, b);
  tile_load<4>(low, a_stride);
  tile_dot<0, 4, 6>();
  tile_load<5>(low + 16 * a_stride, a_stride);
  tile_dot<1, 4, 7>();
  tile_dot<2, 5, 6>();
  tile_dot<3, 5, 7>();
}
inline void zero_2x2() {
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
}
inline void load_2x2(const float* c, bool zero) {
  if (zero) return zero_2x2();
  tile_load<0>(c, 128), tile_load<1>(c + 16, 128), tile_load<2>(c + 512, 128), tile_load<3>(c + 528, 128);
}
inline void store_2x2(float* c) {
  tile_store<0>(c, 128), tile_store<1>(c + 16, 128), tile_store<2>(c + 512, 128), tile_store<3>(c + 528, 128);
}

inline void transpose_16x16(__m512i* r) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// [count, D] of bfloat16, read as if zeros went on for ever.
struct Rows {
  const uint16_t* data;
  int64_t stride, count, D;
  __m512i load(int64_t n, int64_t d) const {  // 32 values
    if (n >= count || d >= D) return _mm512_setzero_si512();
    return _mm512_maskz_loadu_epi16(first_lanes(D - d), data + n * stride + d);
  }
};

// Packing. A block is 32 rows; per 32 columns it takes two tiles, padded with zeros.

// As right operands of X rows^T: a tile has 16 of the rows, its row a pair of columns.
// Returns squared norms, lane by lane the larger of the rows n and n + 16; infinite where they are not finite.
__m512 pack_transposed(const Rows& rows, int64_t begin, char* tiles) {
  __m512 largest = _mm512_setzero_ps();
  for (int half = 0; half < 2; ++half) {
    __m512 norm = _mm512_setzero_ps();
    for (int64_t d = 0; d < rows.D; d += 32) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) r[i] = rows.load(begin + 16 * half + i, d);
      transpose_16x16(r);
      char* tile = tiles + (d / 16 + half) * kTileBytes;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        _mm512_store_si512(tile + 64 * i, r[i]);
        norm = _mm512_dpbf16_ps(norm, (__m512bh)r[i], (__m512bh)r[i]);
      }
    }
    const __m512 infinite = _mm512_set1_ps(INFINITY);
    const __mmask16 finite = _mm512_cmp_ps_mask(norm, infinite, _CMP_LT_OQ);
    largest = _mm512_max_ps(largest, _mm512_mask_blend_ps(finite, infinite, norm));
  }
  return largest;
}

// As right operands of X rows: a tile has 16 of the columns, its row the pair of rows n and n + 16 (as upper_halves).
void pack_pairs(const Rows& rows, int64_t begin, char* tiles) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,  //
                                       39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t d = 0; d < rows.D; d += 32)
    for (int n = 0; n < 16; ++n) {
      const __m512i even = rows.load(begin + n, d), odd = rows.load(begin + n + 16, d);
      char* tile = tiles + d / 16 * kTileBytes + 64 * n;
      _mm512_store_si512(tile, _mm512_permutex2var_epi16(even, low, odd));
      _mm512_store_si512(tile + kTileBytes, _mm512_permutex2var_epi16(even, high, odd));
    }
}

// As left operands of rows^T X, from the tiles of pack_pairs: a tile's row is a column.
void transpose_pairs(const char* pairs, int64_t tiles, char* transposed) {
  for (int64_t tile = 0; tile < tiles; ++tile) {
    __m512i r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(pairs + tile * kTileBytes + 64 * i);
    transpose_16x16(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_store_si512(transposed + tile * kTileBytes + 64 * i, r[i]);
  }
}

// As left operands of rows X: the rows themselves, padded.
inline void pack_row(const Rows& rows, int64_t n, char* packed) {
  for (int64_t d = 0; d < rows.D; d += 32) _mm512_store_si512(packed + 2 * d, rows.load(n, d));
}
void pack_rows(const Rows& rows, int64_t begin, char* packed) {
  for (int n = 0; n < kBlock; ++n) pack_row(rows, begin + n, packed + n * round_up(rows.D, 32) * 2);
}

void write_row(const __m512* values, __m512 factor, int64_t D, void* to) {  // D values, 16 a vector
  for (int64_t d = 0; d < D; d += 32, values += 2) {
    const __m512 low = _mm512_mul_ps(values[0], factor), high = _mm512_mul_ps(values[1], factor);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    _mm512_mask_storeu_epi16(static_cast<uint16_t*>(to) + d, first_lanes(D - d), both);
  }
}

// The upper 16 bits of each lane: of a in the even places, of b in the odd ones.
inline __m512i upper_halves(__m512 a, __m512 b) {
  return _mm512_ternarylogic_epi32(_mm512_srli_epi32((__m512i)a, 16), (__m512i)b, _mm512_set1_epi32(0xffff0000), 0xf8);
}

// a and b as bfloat16 high + low, exact to 2^-16. Both are cut, not rounded; the factor makes up for the mean loss, and
// keeps low from being 0, so that a product with infinity stays infinite.
inline void split(__m512 a, __m512 b, char* high, char* low) {
  const __m512i upper = _mm512_set1_epi32(0xffff0000);
  const __m512 factor = _mm512_set1_ps(1.0f + 0x1p-17f);
  const __m512 a_low = _mm512_fmsub_ps(a, factor, (__m512)_mm512_and_si512((__m512i)a, upper));
  const __m512 b_low = _mm512_fmsub_ps(b, factor, (__m512)_mm512_and_si512((__m512i)b, upper));
  _mm512_store_si512(high, upper_halves(a, b));
  _mm512_store_si512(low, upper_halves(a_low, b_low));
}

// 2^t in the masked lanes, else 0. Minimax of degree 5 on [0, 1] with exact ends, so it is continuous and 2^0 is 1;
// relative error 1e-7 (1.5e-7 with rounding). reduce and scalef do the rest, also for infinities and NaN.
inline __m512 exp2_ps(__mmask16 mask, __m512 t) {
  const __m512 fraction = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 y = _mm512_set1_ps(0.0018793197814375162f);
  y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(0.008990993723273277f));
  y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(0.05581868067383766f));
  y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(0.2401592880487442f));
  y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(0.6931517124176025f));
  y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(1.0f));
  return _mm512_maskz_scalef_ps(mask, y, t);
}

// A product that the compiler does not contract with what follows.
inline __m512 rounded_product(__m512 a, __m512 b) {
  return _mm512_mul_round_ps(a, b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// Cuts a workspace into 64-byte aligned arrays; with a null base it only counts.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <class T = char>
  T* take(int64_t count) {
    char* at = base_ + used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(at);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

struct ForwardWorkspace {
  float* key_norm;     // largest squared norm of a key
  char *key, *value;   // [block, D / 32] pairs of tiles: transposed; pairs
  char* query;         // [32, D]
  float* probability;  // [block, 32, 32]: logits, then not yet normalised probabilities
  char* split;         // [2, high and low, 32, 32]: the current group of them
  float* output;       // [D / 32, 32, 32], not yet normalised
  float *sum, *shift, *weight;  // [32, 16], [32], [32]
  size_t bytes;

  ForwardWorkspace(char* base, int64_t N, int64_t D) {
    const int64_t blocks = round_up(N, kBlock) / kBlock, padded_D = round_up(D, 32);
    Arena arena(base);
    key_norm = arena.take<float>(1);
    key = arena.take(blocks * kBlock * padded_D * 2);
    value = arena.take(blocks * kBlock * padded_D * 2);
    query = arena.take(kBlock * padded_D * 2);
    probability = arena.take<float>((blocks + 1) * kBlockValues);
    split = arena.take(kGroup * 2 * kHalf);
    output = arena.take<float>(kBlock * padded_D);
    sum = arena.take<float>(kBlock * 16);
    shift = arena.take<float>(kBlock);
    weight = arena.take<float>(kBlock);
    bytes = arena.used();
  }
};

// 32 query rows, packed in w.query, against all keys.
template <bool kImportance>
struct ForwardRows {
  const ForwardWorkspace& w;
  int64_t N, slices;  // slices: D / 32
  __m512 factor;      // scale * log2(e)

  float* block(int64_t n) const { return w.probability + (kImportance ? n : n & 1) * kBlockValues; }

  void logits(int64_t n, float* to) const {
    zero_2x2();
    for (int64_t k = 0; k < slices; ++k)
      dot_2x2(w.query + 64 * k, 64 * slices, w.key + (n * slices + k) * 2 * kTileBytes);
    store_2x2(to);
  }

  void row_maxima() const {
    __m512 largest[kBlock];
    for (__m512& x : largest) x = _mm512_set1_ps(-INFINITY);
    for (int64_t n = 0; n * kBlock < N; ++n) {
      const __mmask32 mask = first_lanes(N - n * kBlock);
      logits(n, w.probability);
      for (int row = 0; row < kBlock; ++row)
        for (int half = 0; half < 2; ++half) {
          const __m512 t = rounded_product(_mm512_load_ps(w.probability + row * kBlock + 16 * half), factor);
          largest[row] = _mm512_mask_max_ps(largest[row], mask >> 16 * half, largest[row], t);
        }
    }
    for (int row = 0; row < kBlock; ++row)
      w.shift[row] = w.shift[row] <= kMaxExponent ? 0.0f : _mm512_reduce_max_ps(largest[row]);
  }

  // Bounded: the shift is 0.
  template <bool kBounded>
  __m512 exponent(const float* logits, __m512 shift) const {
    const __m512 t = rounded_product(_mm512_load_ps(logits), factor);
    return kBounded ? t : _mm512_sub_ps(t, shift);
  }

  template <bool kBounded>
  void exponentials(int64_t n) const {
    const __mmask32 mask = first_lanes(N - n * kBlock);
    const __mmask16 first = mask, second = mask >> 16;
    float *p = block(n), *sum = w.sum;
    char* to = w.split + n % kGroup * 2 * kHalf;
#pragma GCC unroll 4
    for (int row = 0; row < kBlock; ++row, p += kBlock, sum += 16, to += 2 * kBlock) {
      const __m512 shift = _mm512_set1_ps(w.shift[row]);
      // Rounded as row_maxima rounds, so the largest logit has 2^0: in one FMA a logit of 1e10 would leave its rounding.
      const __m512 a = exp2_ps(first, exponent<kBounded>(p, shift));
      const __m512 b = exp2_ps(second, exponent<kBounded>(p + 16, shift));
      if (kImportance) {
        _mm512_store_ps(p, a);
        _mm512_store_ps(p + 16, b);
      }
      split(a, b, to, to + kHalf);
      _mm512_store_ps(sum, _mm512_add_ps(_mm512_load_ps(sum), _mm512_add_ps(a, b)));
    }
  }

  // Blocks begin .. end - 1 of keys, of one group.
  void add_output(int64_t begin, int64_t end) const {
    for (int64_t k = 0; k < slices; ++k) {
      float* output = w.output + k * kBlockValues;
      load_2x2(output, begin == 0);
      for (int64_t n = begin; n < end; ++n) {
        const char* high = w.split + n % kGroup * 2 * kHalf;
        dot_2x2(high, high + kHalf, 2 * kBlock, w.value + (n * slices + k) * 2 * kTileBytes);
      }
      store_2x2(output);
    }
  }

  template <bool kBounded>
  void run() const {
    for (int i = 0; i < kBlock; ++i) _mm512_store_ps(w.sum + 16 * i, _mm512_setzero_ps());
    const int64_t blocks = round_up(N, kBlock) / kBlock;
    logits(0, block(0));
    for (int64_t n = 0; n < blocks; ++n) {
      if (n + 1 < blocks) logits(n + 1, block(n + 1));
      exponentials<kBounded>(n);
      if ((n + 1) % kGroup == 0 || n + 1 == blocks) add_output(n / kGroup * kGroup, n + 1);
    }
  }
};

// column_sum += weight of its row * probability: 32 rows in float, then in double.
void add_columns(const ForwardWorkspace& w, int rows, int64_t N, int64_t num_keyframe, double* column_sum) {
  for (int64_t n = num_keyframe / kBlock; n * kBlock < N; ++n) {
    const float* p = w.probability + n * kBlockValues;
    __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int row = 0; row < rows; row += 2)
      for (int i = 0; i < 2 && row + i < rows; ++i) {
        const __m512 weight = _mm512_set1_ps(w.weight[row + i]);
        sum[2 * i] = _mm512_fmadd_ps(_mm512_load_ps(p + (row + i) * kBlock), weight, sum[2 * i]);
        sum[2 * i + 1] = _mm512_fmadd_ps(_mm512_load_ps(p + (row + i) * kBlock + 16), weight, sum[2 * i + 1]);
      }
    for (int quarter = 0; quarter < 4; ++quarter) {
      const int64_t j = n * kBlock + 8 * quarter, skip = num_keyframe - j;
      if (skip >= 8 || j >= N) continue;
      const __mmask8 mask = first_lanes(N - j) & (skip > 0 ? ~0u << skip : ~0u);
      const __m512 both = _mm512_add_ps(sum[quarter / 2], sum[quarter / 2 + 2]);
      const __m256 eight = quarter % 2 ? _mm512_extractf32x8_ps(both, 1) : _mm512_castps512_ps256(both);
      double* to = column_sum + (j - num_keyframe);
      _mm512_mask_storeu_pd(to, mask, _mm512_add_pd(_mm512_maskz_loadu_pd(mask, to), _mm512_cvtps_pd(eight)));
    }
  }
}

template <bool kImportance>
void forward_rows(const AttentionForwardTask& t, const ForwardWorkspace& w) {
  const Rows query{static_cast<const uint16_t*>(t.query), t.query_stride, t.row_end, t.D};
  const int64_t slices = round_up(t.D, 32) / 32;
  const float factor = static_cast<float>(t.scale * kLog2E);
  const ForwardRows<kImportance> all_keys{w, t.N, slices, _mm512_set1_ps(factor)};
  for (int64_t begin = t.row_begin; begin < t.row_end; begin += kBlock) {
    const int rows = static_cast<int>(t.row_end - begin < kBlock ? t.row_end - begin : kBlock);
    pack_rows(query, begin, w.query);
    bool bounded = true;
    for (int row = 0; row < kBlock; ++row) {
      __m512 norm = _mm512_setzero_ps();
      for (int64_t k = 0; k < slices; ++k) {
        const __m512bh q = (__m512bh)_mm512_load_si512(w.query + (row * slices + k) * 64);
        norm = _mm512_dpbf16_ps(norm, q, q);
      }
      w.shift[row] = sqrtf(_mm512_reduce_add_ps(norm) * *w.key_norm) * fabsf(factor);
      bounded &= w.shift[row] <= kMaxExponent;  // not so for NaN
    }
    if (bounded) {
      for (int row = 0; row < kBlock; ++row) w.shift[row] = 0;
      all_keys.template run<true>();
    } else {
      all_keys.row_maxima();
      all_keys.template run<false>();
    }

    for (int row = 0; row < rows; ++row) {
      const int64_t i = begin + row;
      const float sum = _mm512_reduce_add_ps(_mm512_load_ps(w.sum + row * 16));
      w.weight[row] = (i < t.num_keyframe ? static_cast<float>(t.keyframe_weight) : 1.0f) / sum;
      static_cast<float*>(t.lse)[i] = w.shift[row] * static_cast<float>(kLn2) + logf(sum);
      __m512 output[16];
      for (int64_t k = 0; k < slices; ++k)
        for (int half = 0; half < 2; ++half)
          output[2 * k + half] = _mm512_load_ps(w.output + k * kBlockValues + row * kBlock + 16 * half);
      write_row(output, _mm512_set1_ps(1.0f / sum), t.D, static_cast<uint16_t*>(t.output) + i * t.output_stride);
    }
    if (kImportance) add_columns(w, rows, t.N, t.num_keyframe, t.column_sum);
  }
}

void forward(const AttentionForwardTask& t, char* workspace) {
  const ForwardWorkspace w(workspace, t.N, t.D);
  const TileMode mode;
  if (!t.same_head) {
    const Rows key{static_cast<const uint16_t*>(t.key), t.key_stride, t.N, t.D};
    const Rows value{static_cast<const uint16_t*>(t.value), t.value_stride, t.N, t.D};
    const int64_t block_bytes = kBlock * round_up(t.D, 32) * 2;
    __m512 norm = _mm512_setzero_ps();
    for (int64_t n = 0; n * kBlock < t.N; ++n) {
      norm = _mm512_max_ps(norm, pack_transposed(key, n * kBlock, w.key + n * block_bytes));
      pack_pairs(value, n * kBlock, w.value + n * block_bytes);
    }
    *w.key_norm = _mm512_reduce_max_ps(norm);
  }
  if (t.column_sum) {
    for (int64_t j = 0; j < t.N - t.num_keyframe; ++j) t.column_sum[j] = 0;
    forward_rows<true>(t, w);
  } else {
    forward_rows<false>(t, w);
  }
}

size_t forward_workspace(int64_t N, int64_t D) { return ForwardWorkspace(nullptr, N, D).bytes; }

// The backward works on transposed blocks, [32 keys, 32 queries]: what belongs to a query lies along the lanes.
struct BackwardWorkspace {
  char *key, *value;        // [block, 32, D]
  char* key_transposed;     // [block, D / 32] pairs of tiles
  float *grad_key, *grad_value;  // [block, D / 32, 32, 32]
  float* importance;        // [N], scaled gradient of it; 0 for the keyframe's
  char* rows;               // [32, D]: gathered
  char *query, *grad_output, *query_pairs, *grad_output_pairs;  // [128 / 32, D / 32] pairs of tiles
  float* grad_query;        // [D / 32, 128 / 32, 32, 32], columns first
  float *logits, *grad_probability;  // [32, 32]
  char *probability, *grad_logit;    // [2, 32 keys, 128]: high and low, left operands
  char* grad_logit_right;   // [2, 128 / 16] tiles: the right operand
  float *shift, *weight;             // [128]: P = 2^(logit - shift) / sum
  float *row_term, *inverse;         // [128]: sum_j P_ij dP_ij, 1 / sum
  size_t bytes;

  BackwardWorkspace(char* base, int64_t N, int64_t D) {
    const int64_t padded_N = round_up(N, kBlock), padded_D = round_up(D, 32);
    Arena arena(base);
    key = arena.take(padded_N * padded_D * 2);
    value = arena.take(padded_N * padded_D * 2);
    key_transposed = arena.take(padded_N * padded_D * 2);
    grad_key = arena.take<float>(padded_N * padded_D);
    grad_value = arena.take<float>(padded_N * padded_D);
    importance = arena.take<float>(padded_N);
    rows = arena.take(kBlock * padded_D * 2);
    query = arena.take(kQueries * padded_D * 2);
    grad_output = arena.take(kQueries * padded_D * 2);
    query_pairs = arena.take(kQueries * padded_D * 2);
    grad_output_pairs = arena.take(kQueries * padded_D * 2);
    grad_query = arena.take<float>(kQueries * padded_D);
    logits = arena.take<float>(kBlockValues);
    grad_probability = arena.take<float>(kBlockValues);
    probability = arena.take(2 * kBlock * kQueries * 2);
    grad_logit = arena.take(2 * kBlock * kQueries * 2);
    grad_logit_right = arena.take(2 * kBlock * kQueries * 2);
    shift = arena.take<float>(kQueries);
    weight = arena.take<float>(kQueries);
    row_term = arena.take<float>(kQueries);
    inverse = arena.take<float>(kQueries);
    bytes = arena.used();
  }
};

// 128 query rows, packed in w, against all keys.
struct BackwardRows {
  const BackwardWorkspace& w;
  int64_t N, slices;
  __m512 factor;  // scale * log2(e)
  int parts;      // of 32 query rows
  bool first;     // the first rows of the head: grad_key and grad_value start from zero
  bool has_output;  // else grad_output is zero, and a product of zero and NaN is not wanted
  static constexpr int kStride = kQueries * 2, kLow = kBlock * kStride;

  // Of 32 keys and 32 queries.
  void logits(int64_t n, int part) const {
    const int64_t stride = 64 * slices;
    zero_2x2();
    for (int64_t k = 0; k < slices; ++k)
      dot_2x2(w.key + n * kBlock * stride + 64 * k, stride, w.query + (part * slices + k) * 2 * kTileBytes);
    store_2x2(w.logits);
  }

  // Logits and dO . V of 32 keys and 32 queries.
  void products(int64_t n, int part) const {
    const int64_t stride = 64 * slices;
    logits(n, part);
    if (!has_output) return;  // w.grad_probability stays zero
    zero_2x2();
    for (int64_t k = 0; k < slices; ++k)
      dot_2x2(w.value + n * kBlock * stride + 64 * k, stride, w.grad_output + (part * slices + k) * 2 * kTileBytes);
    store_2x2(w.grad_probability);
  }

  struct Pair {
    __m512 probability, grad_probability;
  };
  // Of a key and 16 queries, P times its row's sum; no key past the last has a probability.
  Pair pair(int64_t n, int key, int part, int half) const {
    const int at = part * kBlock + 16 * half, in = key * kBlock + 16 * half;
    const __mmask16 real = n * kBlock + key < N ? 0xffff : 0;
    const __m512 logit = rounded_product(_mm512_load_ps(w.logits + in), factor);
    const __m512 t = _mm512_sub_ps(logit, _mm512_load_ps(w.shift + at));
    const __m512 importance = _mm512_set1_ps(w.importance[n * kBlock + key]);
    return {exp2_ps(real, t),
            _mm512_fmadd_ps(_mm512_load_ps(w.weight + at), importance, _mm512_load_ps(w.grad_probability + in))};
  }

  // The shift is the log-sum-exp, whose rounding grows with the logits: where it is large, the exact row maximum, so that
  // a probability of 1 is exactly 1 and leaves no gradient.
  void exact_shifts() const {
    bool large = false;
    for (int i = 0; i < parts * kBlock; ++i) large |= fabsf(w.shift[i]) > kMaxExponent && w.shift[i] < INFINITY;
    if (!large) return;
    for (int part = 0; part < parts; ++part) {
      __m512 largest[2] = {_mm512_set1_ps(-INFINITY), _mm512_set1_ps(-INFINITY)};
      for (int64_t n = 0; n * kBlock < N; ++n) {
        logits(n, part);
        for (int key = 0; key < kBlock && n * kBlock + key < N; ++key)
          for (int half = 0; half < 2; ++half) {
            const __m512 t = rounded_product(_mm512_load_ps(w.logits + key * kBlock + 16 * half), factor);
            largest[half] = _mm512_max_ps(t, largest[half]);
          }
      }
      for (int half = 0; half < 2; ++half) {
        float* to = w.shift + part * kBlock + 16 * half;
        const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_load_ps(to), _mm512_set1_ps(INFINITY), _CMP_LT_OQ);
        _mm512_mask_store_ps(to, finite, largest[half]);
      }
    }
  }

  void row_terms() const {
    for (int i = 0; i < kQueries; ++i) w.row_term[i] = w.inverse[i] = 0;
    for (int64_t n = 0; n * kBlock < N; ++n)
      for (int part = 0; part < parts; ++part) {
        products(n, part);
        __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, row_sum[2] = {sum[0], sum[0]};
        for (int key = 0; key < kBlock; ++key)
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) {
            const Pair x = pair(n, key, part, half);
            sum[half] = _mm512_fmadd_ps(x.probability, x.grad_probability, sum[half]);
            row_sum[half] = _mm512_add_ps(x.probability, row_sum[half]);
          }
        for (int half = 0; half < 2; ++half) {
          const int at = part * kBlock + 16 * half;
          _mm512_store_ps(w.row_term + at, _mm512_add_ps(_mm512_load_ps(w.row_term + at), sum[half]));
          _mm512_store_ps(w.inverse + at, _mm512_add_ps(_mm512_load_ps(w.inverse + at), row_sum[half]));
        }
      }
    for (int at = 0; at < parts * kBlock; at += 16) {
      const __m512 row_sum = _mm512_load_ps(w.inverse + at);
      // Rows past the last sum to 0.
      const __mmask16 real = _mm512_cmp_ps_mask(row_sum, _mm512_setzero_ps(), _CMP_NEQ_UQ);
      const __m512 inverse = _mm512_maskz_div_ps(real, _mm512_set1_ps(1.0f), row_sum);
      _mm512_store_ps(w.inverse + at, inverse);
      _mm512_store_ps(w.row_term + at, _mm512_mul_ps(_mm512_load_ps(w.row_term + at), inverse));
    }
  }

  // P and dS = P (dP - row term) of 32 keys and 32 queries, in the forms that the three products take.
  void split_grad_logits(int64_t n, int part) const {
    for (int key = 0; key < 16; ++key) {
      __m512 grad_logit[2][2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        __m512 probability[2];
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const Pair x = pair(n, key + 16 * i, part, half);
          const int of_query = part * kBlock + 16 * half;
          const __m512 row_term = _mm512_load_ps(w.row_term + of_query);
          probability[half] = _mm512_mul_ps(x.probability, _mm512_load_ps(w.inverse + of_query));
          grad_logit[i][half] = _mm512_mul_ps(probability[half], _mm512_sub_ps(x.grad_probability, row_term));
        }
        const int64_t at = (key + 16 * i) * kStride + part * 64;
        split(probability[0], probability[1], w.probability + at, w.probability + at + kLow);
        split(grad_logit[i][0], grad_logit[i][1], w.grad_logit + at, w.grad_logit + at + kLow);
      }
      for (int half = 0; half < 2; ++half) {
        char* to = w.grad_logit_right + (part * 2 + half) * kTileBytes + 64 * key;
        split(grad_logit[0][half], grad_logit[1][half], to, to + kLow);
      }
    }
  }

  // sum += left [32 keys, queries] times right [queries, D], 32 columns at a time.
  void add_product(const char* left, const char* right, float* sum) const {
    for (int64_t k = 0; k < slices; ++k) {
      load_2x2(sum + k * kBlockValues, first);
      for (int part = 0; part < parts; ++part) {
        const char* high = left + 64 * part;
        dot_2x2(high, high + kLow, kStride, right + (part * slices + k) * 2 * kTileBytes);
      }
      store_2x2(sum + k * kBlockValues);
    }
  }

  void add_grad_query(int64_t n) const {
    for (int64_t k = 0; k < slices; ++k)
      for (int part = 0; part < parts; ++part) {
        float* sum = w.grad_query + (k * (kQueries / kBlock) + part) * kBlockValues;
        const char* left = w.key_transposed + (n * slices + k) * 2 * kTileBytes;
        const char* right = w.grad_logit_right + part * 2 * kTileBytes;
        load_2x2(sum, n == 0);
        dot_2x2(left, 64, right);
        dot_2x2(left, 64, right + kLow);
        store_2x2(sum);
      }
  }

  void run() const {
    if (!has_output)
      for (int64_t i = 0; i < kBlockValues; ++i) w.grad_probability[i] = 0;
    exact_shifts();
    row_terms();
    for (int64_t n = 0; n * kBlock < N; ++n) {
      for (int part = 0; part < parts; ++part) {
        products(n, part);
        split_grad_logits(n, part);
      }
      const int64_t at = n * slices * kBlockValues;
      if (has_output) add_product(w.probability, w.grad_output_pairs, w.grad_value + at);
      add_product(w.grad_logit, w.query_pairs, w.grad_key + at);
      add_grad_query(n);
    }
  }
};

// 32 rows of data, [32, padded D]: row r is row at[r], or zero from count on or where at[r] is -1.
void gather(const void* data, int64_t stride, int64_t D, const int32_t* at, int64_t count, char* rows) {
  const int64_t padded_D = round_up(D, 32);
  for (int r = 0; r < kBlock; ++r) {
    const bool real = r < count && at[r] >= 0;
    const Rows row{static_cast<const uint16_t*>(data) + (real ? at[r] * stride : 0), stride, real, D};
    pack_row(row, 0, rows + r * padded_D * 2);
  }
}

void write_grad_query(const BackwardWorkspace& w, int part, const AttentionBackwardTask& t, int64_t begin) {
  const int64_t slices = round_up(t.D, 32) / 32;
  __m512 rows[kBlock][16];
  for (int64_t k = 0; k < slices; ++k)
    for (int columns = 0; columns < 2; ++columns)
      for (int half = 0; half < 2; ++half) {
        const float* block = w.grad_query + (k * (kQueries / kBlock) + part) * kBlockValues;
        const float* from = block + columns * 16 * kBlock + 16 * half;
        __m512i r[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) r[i] = (__m512i)_mm512_load_ps(from + i * kBlock);
        transpose_16x16(r);
        for (int i = 0; i < 16; ++i) rows[16 * half + i][2 * k + columns] = (__m512)r[i];
      }
  for (int i = 0; i < kBlock && begin + i < t.R; ++i)
    write_row(rows[i], _mm512_set1_ps(static_cast<float>(t.scale)), t.D,
              static_cast<uint16_t*>(t.grad_query) + t.row[begin + i] * t.grad_query_stride);
}

// sum null: zeros.
void write_grad(const float* sum, float factor, const AttentionBackwardTask& t, void* to, int64_t stride) {
  const int64_t slices = round_up(t.D, 32) / 32;
  for (int64_t j = 0; j < t.N; ++j) {
    __m512 row[16];
    for (int64_t k = 0; k < slices; ++k)
      for (int half = 0; half < 2; ++half)
        row[2 * k + half] = sum ? _mm512_load_ps(sum + (j / kBlock * slices + k) * kBlockValues + j % kBlock * kBlock +
                                                 16 * half)
                                : _mm512_setzero_ps();
    write_row(row, _mm512_set1_ps(factor), t.D, static_cast<uint16_t*>(to) + j * stride);
  }
}

void backward(const AttentionBackwardTask& t, char* workspace) {
  const BackwardWorkspace w(workspace, t.N, t.D);
  const TileMode mode;
  const int64_t padded_D = round_up(t.D, 32), slices = padded_D / 32, block_bytes = kBlock * padded_D * 2;
  const Rows key{static_cast<const uint16_t*>(t.key), t.key_stride, t.N, t.D};
  const Rows value{static_cast<const uint16_t*>(t.value), t.value_stride, t.N, t.D};
  for (int64_t n = 0; n * kBlock < t.N; ++n) {
    pack_rows(key, n * kBlock, w.key + n * block_bytes);
    pack_rows(value, n * kBlock, w.value + n * block_bytes);
    pack_pairs(key, n * kBlock, w.rows);
    transpose_pairs(w.rows, 2 * slices, w.key_transposed + n * block_bytes);
  }
  const float* grad_importance = static_cast<const float*>(t.grad_importance);
  for (int64_t j = 0; j < round_up(t.N, kBlock); ++j)
    w.importance[j] = grad_importance && j >= t.num_keyframe && j < t.N
                          ? grad_importance[j - t.num_keyframe] * static_cast<float>(t.importance_scale)
                          : 0.0f;
  // The softmax of one logit is exactly 1, so its gradient is exactly 0; log and exp would leave 1e-7 of it.
  const double exponent = t.N == 1 ? 0.0 : kLog2E;
  const float log2e = static_cast<float>(exponent), factor = static_cast<float>(t.scale * exponent);
  uint16_t* grad_query = static_cast<uint16_t*>(t.grad_query);
  for (int64_t i = 0, r = 0; i < t.N; ++i)
    if (r < t.R && t.row[r] == i)
      ++r;
    else
      for (int64_t d = 0; d < t.D; ++d) grad_query[i * t.grad_query_stride + d] = 0;

  const Rows gathered{reinterpret_cast<const uint16_t*>(w.rows), padded_D, kBlock, padded_D};
  for (int64_t begin = 0; begin < t.R; begin += kQueries) {
    const int64_t count = t.R - begin < kQueries ? t.R - begin : kQueries;
    const int parts = static_cast<int>(round_up(count, kBlock) / kBlock);
    for (int64_t r = 0; r < parts * kBlock; ++r) {
      const bool real = r < count;
      const int64_t i = real ? t.row[begin + r] : 0;
      // Rows past the last have no probability.
      w.shift[r] = real ? static_cast<const float*>(t.lse)[i] * log2e : INFINITY;
      w.weight[r] = i < t.num_keyframe ? static_cast<float>(t.keyframe_weight) : 1.0f;
    }
    for (int part = 0; part < parts; ++part) {
      const int64_t at = part * block_bytes, r = begin + part * kBlock;
      gather(t.query, t.query_stride, t.D, t.row + r, t.R - r, w.rows);
      pack_transposed(gathered, 0, w.query + at);
      pack_pairs(gathered, 0, w.query_pairs + at);
      if (!t.grad_output) continue;
      gather(t.grad_output, t.grad_output_stride, t.D, t.slot + r, t.R - r, w.rows);
      pack_transposed(gathered, 0, w.grad_output + at);
      pack_pairs(gathered, 0, w.grad_output_pairs + at);
    }
    BackwardRows{w, t.N, slices, _mm512_set1_ps(factor), parts, begin == 0, t.grad_output != nullptr}.run();
    for (int part = 0; part < parts; ++part) write_grad_query(w, part, t, begin + part * kBlock);
  }
  write_grad(t.R > 0 ? w.grad_key : nullptr, static_cast<float>(t.scale), t, t.grad_key, t.grad_key_stride);
  write_grad(t.R > 0 && t.grad_output ? w.grad_value : nullptr, 1.0f, t, t.grad_value, t.grad_value_stride);
}

size_t backward_workspace(int64_t N, int64_t D) { return BackwardWorkspace(nullptr, N, D).bytes; }

constexpr AttentionKernels kKernels = {forward_workspace, forward, backward_workspace, backward};

}  // namespace

const AttentionKernels* attention_kernels(DType dtype, int64_t D) {
  return dtype == DType::bfloat16 && D <= 256 ? &kKernels : nullptr;
}

}  // namespace amx
}  // namespace evad
