// select_tokens: indices of the highest importances, ascending; gather_tokens: the rows they name.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "range_check.h"

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
  int64_t rank;

  EVAD_HOST_DEVICE bool candidate(Key key) const { return (key & known) == threshold; }

  EVAD_HOST_DEVICE static int digit(Key key, int shift) { return static_cast<int>(key >> shift) & (kDigits - 1); }

  // The digit at `shift` is `digit`; `above` candidates have a higher one.
  EVAD_HOST_DEVICE void fix(int digit, int shift, int64_t above) {
    threshold = static_cast<Key>(threshold | static_cast<Key>(digit) << shift);
    known = static_cast<Key>(known | static_cast<Key>(kDigits - 1) << shift);
    rank -= above;
  }

  // Of a row in which `equal` keys before this one tie with the threshold.
  EVAD_HOST_DEVICE bool selected(Key key, int64_t equal) const {
    return key > threshold || (key == threshold && equal < rank);
  }
};

// index[b, :] = the num_select highest of importance[b, :], ascending; of equal ones those of lower index.
//   importance [B, M], strides in elements    index [B, num_select], contiguous    0 <= num_select <= M
template <class T>
void select_tokens(const T* importance, int64_t stride_b, int64_t stride_m, int64_t B, int64_t M, int64_t num_select,
                   int64_t* index, int threads);

// kept[b] = tokens[b, :num_keyframe], then tokens[b, num_keyframe + index[b, k]] for each k; every byte written once.
// An index outside [0, N - num_keyframe) is reported and nothing is written.
//   tokens [B, N, C], rows contiguous, strides in bytes    index [B, num_select], strides in elements
//   kept [B, num_keyframe + num_select, C], contiguous
RangeCheck gather_tokens_forward(const char* tokens, int64_t stride_b, int64_t stride_n, const int64_t* index,
                                 int64_t index_stride_b, int64_t index_stride_k, int64_t B, int64_t N,
                                 int64_t num_keyframe, int64_t num_select, int64_t row_bytes, char* kept, int threads);

// grad_tokens[b, n] = the sum of grad_kept over the kept rows that copy n, in their order; zeros where there is none.
template <class T>
RangeCheck gather_tokens_backward(const T* grad_kept, const int64_t* index, int64_t index_stride_b,
                                  int64_t index_stride_k, int64_t B, int64_t N, int64_t num_keyframe,
                                  int64_t num_select, int64_t C, T* grad_tokens, int threads);

}  // namespace evad
