// select_tokens: indices of the highest importances, ascending; gather_tokens: the rows they name.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace evad {

// Importance as an unsigned integer of the same order: NaN lowest, then -inf ... +inf; -0 and +0 are one value.
// Integers only, so the order does not depend on how a processor treats subnormals.
template <class Bits>
EVAD_HOST_DEVICE Bits order_key_of_bits(Bits bits, Bits infinity) {
  const Bits sign = static_cast<Bits>(Bits{1} << (8 * sizeof(Bits) - 1));
  const Bits magnitude = static_cast<Bits>(bits & ~sign);
  if (magnitude > infinity) return 0;
  return static_cast<Bits>(bits > sign ? ~bits : bits | sign);
}
EVAD_HOST_DEVICE uint32_t order_key(float x) { return order_key_of_bits<uint32_t>(float_to_bits(x), 0x7f800000u); }
EVAD_HOST_DEVICE uint64_t order_key(double x) {
  return order_key_of_bits<uint64_t>(double_to_bits(x), 0x7ff0000000000000u);
}
EVAD_HOST_DEVICE uint16_t order_key(float16 x) { return order_key_of_bits<uint16_t>(x.bits, 0x7c00u); }
EVAD_HOST_DEVICE uint16_t order_key(bfloat16 x) { return order_key_of_bits<uint16_t>(x.bits, 0x7f80u); }

template <class T>
using order_key_t = decltype(order_key(T{}));

constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;

// Radix selection, a digit at a time from the highest: `known` masks the bits of the num_select-th largest key found so
// far and `threshold` holds them; `rank` is its place, from 1, among the keys that agree in those bits. Once all bits
// are known, a row's selection is every key above `threshold` and the first `rank` of those equal to it.
template <class Key>
struct Selection {
  Key threshold;
  Key known;
  int32_t rank;

  EVAD_HOST_DEVICE bool candidate(Key key) const { return (key & known) == threshold; }

  EVAD_HOST_DEVICE static int digit(Key key, int shift) { return static_cast<int>(key >> shift) & (kDigits - 1); }

  // Finds the digit at `shift` from the candidates' histogram: it is `digit` or lower, and `above` candidates have one
  // higher than `digit`.
  EVAD_HOST_DEVICE void find_digit(const int32_t* histogram, int digit, int32_t above, int shift) {
    while (above + histogram[digit] < rank) above += histogram[digit--];
    threshold = static_cast<Key>(threshold | static_cast<Key>(digit) << shift);
    known = static_cast<Key>(known | static_cast<Key>(kDigits - 1) << shift);
    rank -= above;
  }

  // How many are selected of keys among which `above` are above the threshold and `equal` tie with it: the place of the
  // next one that is.
  EVAD_HOST_DEVICE int32_t place(int32_t above, int32_t equal) const { return above + (equal < rank ? equal : rank); }
};

// Each op runs on CPU threads, or on a CUDA stream (csrc/token_selection.cu).
// index[b, :] = the num_select highest of importance[b, :], ascending; of equal ones those of lower index.
// slot[b, m] = k where index[b, k] = m, kNoSlot where m is not selected; slot may be null.
//   importance [B, M], strides in elements    index [B, num_select], slot [B, M], contiguous    0 <= num_select <= M < 2^31
constexpr int32_t kNoSlot = -1;

template <class T>
void select_tokens(const T* importance, int64_t stride_b, int64_t stride_m, int64_t B, int64_t M, int64_t num_select,
                   int64_t* index, int32_t* slot, int threads);
template <class T>
void select_tokens(const T* importance, int64_t stride_b, int64_t stride_m, int64_t B, int64_t M, int64_t num_select,
                   int64_t* index, int32_t* slot, Stream stream);

// Forward of gather_tokens (copy_rows.h): the keyframe's rows, then the selected; zeros for an index outside.
//   tokens [B, N, C], rows contiguous, strides in bytes    index [B, num_select], strides in elements
struct GatherRows {
  const char* tokens;
  int64_t stride_b, stride_n;
  const int64_t* index;
  int64_t index_stride_b, index_stride_k;
  int64_t N, num_keyframe;

  EVAD_HOST_DEVICE const char* operator()(int64_t b, int64_t row) const {
    const char* const sample = tokens + b * stride_b;
    if (row < num_keyframe) return sample + row * stride_n;
    const int64_t j = index[b * index_stride_b + (row - num_keyframe) * index_stride_k];
    return j >= 0 && j < N - num_keyframe ? sample + (num_keyframe + j) * stride_n : nullptr;
  }
};

// Backward: the gradient of a token is that of the kept row that copies it, their sum in order where several do, zeros
// where none does. copies [2, B, M], M = N - num_keyframe: the first and the last k with index[b, k] = m, or kNoCopy.
constexpr int32_t kNoCopy = -1;

struct GatherGradRows {
  const char* grad_kept;  // [B, num_keyframe + num_select, C], contiguous
  const int64_t* index;
  int64_t index_stride_b, index_stride_k;
  const int32_t* copies;
  int64_t B, N, num_keyframe, num_select, row_bytes;

  EVAD_HOST_DEVICE const char* kept_row(int64_t b, int64_t row) const {
    return grad_kept + (b * (num_keyframe + num_select) + row) * row_bytes;
  }
  EVAD_HOST_DEVICE const int32_t* first(int64_t b, int64_t n) const {
    return copies + b * (N - num_keyframe) + n - num_keyframe;
  }
  EVAD_HOST_DEVICE const int32_t* last(int64_t b, int64_t n) const { return first(b, n) + B * (N - num_keyframe); }

  EVAD_HOST_DEVICE bool repeated(int64_t b, int64_t n) const {
    return n >= num_keyframe && *first(b, n) != *last(b, n);
  }

  EVAD_HOST_DEVICE const char* operator()(int64_t b, int64_t n) const {
    if (n < num_keyframe) return kept_row(b, n);
    const int32_t k = *last(b, n);
    return k == kNoCopy ? nullptr : kept_row(b, num_keyframe + k);
  }
};

// An index outside [0, N - num_keyframe) throws std::invalid_argument on the CPU, before anything is written.
// kept [B, num_keyframe + num_select, C], contiguous.
void gather_tokens_forward(const GatherRows& source, int64_t B, int64_t num_select, int64_t row_bytes, char* kept,
                           int threads);
void gather_tokens_forward(const GatherRows& source, int64_t B, int64_t num_select, int64_t row_bytes, char* kept,
                           Stream stream);

// grad_tokens [B, N, C], contiguous; fills source.copies, which is `copies`.
template <class T>
void gather_tokens_backward(const GatherGradRows& source, int32_t* copies, T* grad_tokens, int threads);
template <class T>
void gather_tokens_backward(const GatherGradRows& source, int32_t* copies, T* grad_tokens, Stream stream);

}  // namespace evad
