// select_tokens: one task a row, radix selection on integer keys, then one pass in order.
// gather_tokens: one task a run of rows; a row is one memcpy. Backward: a token that was kept more than once goes from
// each of its copies to the next, so no row of the gradient is looked for.
#include "token_selection.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "copy_rows.h"
#include "parallel.h"
#include "range_check.h"

namespace evad {
namespace {

constexpr int64_t kKeysPerThread = 4096;  // some 10 us: less is not worth waking the threads
constexpr int64_t kChannels = 64;         // whose sums are in cache while copies are followed

template <class Key>
int bit_width(Key bits) {
  int width = 0;
  for (; bits != 0; bits = static_cast<Key>(bits >> 1)) ++width;
  return width;
}

// The num_select-th largest of keys[0:M], num_select >= 1, and how many of those equal to it are selected.
template <class Key>
Selection<Key> find_threshold(const Key* keys, int64_t M, int32_t num_select, Key* candidates) {
  // Importances share sign and exponent bits: the first digit starts at the highest bit in which keys differ.
  Key all = static_cast<Key>(~Key{0}), any = 0;
  for (int64_t j = 0; j < M; ++j) {
    all &= keys[j];
    any |= keys[j];
  }
  const int width = bit_width(static_cast<Key>(all ^ any));
  if (width == 0) return {all, static_cast<Key>(~Key{0}), num_select};
  const Key common = static_cast<Key>(~static_cast<Key>((Key{2} << (width - 1)) - 1));
  Selection<Key> selection{static_cast<Key>(all & common), common, num_select};
  int64_t count = M;
  for (int shift = std::max(width - kDigitBits, 0);; shift = std::max(shift - kDigitBits, 0)) {
    int32_t histogram[kDigits] = {};
    for (int64_t j = 0; j < count; ++j) ++histogram[selection.digit(keys[j], shift)];
    selection.find_digit(histogram, kDigits - 1, 0, shift);
    if (shift == 0) return selection;
    int64_t kept = 0;
    for (int64_t j = 0; j < count; ++j) {
      const Key key = keys[j];
      candidates[kept] = key;
      kept += selection.candidate(key);
    }
    keys = candidates;
    count = kept;
  }
}

template <class T>
void select_row(const T* importance, int64_t stride, int64_t M, int32_t num_select, int64_t* index, int32_t* slot) {
  if (slot != nullptr) std::fill(slot, slot + M, kNoSlot);
  if (num_select == 0) return;
  using Key = order_key_t<T>;
  const std::unique_ptr<Key[]> scratch(new Key[2 * M]);
  Key* const keys = scratch.get();
  if (stride == 1)
    for (int64_t j = 0; j < M; ++j) keys[j] = order_key(importance[j]);
  else
    for (int64_t j = 0; j < M; ++j) keys[j] = order_key(importance[j * stride]);
  const Selection<Key> selection = find_threshold(keys, M, num_select, keys + M);
  int32_t above = 0, equal = 0, place = 0;
  for (int64_t j = 0; place < num_select; ++j) {  // the next place is written until a selected j stays
    index[place] = j;
    above += keys[j] > selection.threshold;
    equal += keys[j] == selection.threshold;
    place = selection.place(above, equal);
  }
  if (slot == nullptr) return;
  for (int32_t k = 0; k < num_select; ++k) slot[index[k]] = k;
}

// grad [C] = the sum of the rows that copy token n, in order; the one after row k is next[k].
template <class T>
void sum_copies(const GatherGradRows& source, const int32_t* next, int64_t b, int64_t n, int64_t C, T* grad) {
  const int32_t first = *source.first(b, n), last = *source.last(b, n);
  for (int64_t begin = 0; begin < C; begin += kChannels) {
    const int64_t channels = std::min(kChannels, C - begin);
    accumulate_t<T> total[kChannels] = {};
    for (int32_t k = first;; k = next[k]) {
      const T* const row = reinterpret_cast<const T*>(source.kept_row(b, source.num_keyframe + k)) + begin;
      for (int64_t c = 0; c < channels; ++c) total[c] += to_float(row[c]);
      if (k == last) break;
    }
    std::transform(total, total + channels, grad + begin, from_float<T>);
  }
}

}  // namespace

template <class T>
void select_tokens(const T* importance, int64_t stride_b, int64_t stride_m, int64_t B, int64_t M, int64_t num_select,
                   int64_t* index, int32_t* slot, int threads) {
  if (M == 0 || (num_select == 0 && slot == nullptr)) return;
  parallel_for(
      B, threads,
      [&](int64_t b) {
        select_row(importance + b * stride_b, stride_m, M, static_cast<int32_t>(num_select), index + b * num_select,
                   slot == nullptr ? nullptr : slot + b * M);
      },
      kKeysPerThread / M);
}

void gather_tokens_forward(const GatherRows& source, int64_t B, int64_t num_select, int64_t row_bytes, char* kept,
                           int threads) {
  require_in_range("gather_tokens: index", source.index, source.index_stride_b, source.index_stride_k, B, num_select,
                   source.N - source.num_keyframe);
  copy_rows(source, B, source.num_keyframe + num_select, row_bytes, kept, threads);
}

template <class T>
void gather_tokens_backward(const GatherGradRows& source, int32_t* copies, T* grad_tokens, int threads) {
  const int64_t B = source.B, N = source.N, M = N - source.num_keyframe;
  require_in_range("gather_tokens: index", source.index, source.index_stride_b, source.index_stride_k, B,
                   source.num_select, M);
  std::fill(copies, copies + 2 * B * M, kNoCopy);
  const std::unique_ptr<int32_t[]> next(new int32_t[B * source.num_select]);  // of a row with a later copy
  for (int64_t b = 0; b < B; ++b)
    for (int64_t k = 0; k < source.num_select; ++k) {
      int32_t* const first = copies + b * M + source.index[b * source.index_stride_b + k * source.index_stride_k];
      int32_t* const last = first + B * M;
      int32_t& place = *first == kNoCopy ? *first : next[b * source.num_select + *last];
      place = *last = static_cast<int32_t>(k);
    }
  copy_rows(source, B, N, source.row_bytes, reinterpret_cast<char*>(grad_tokens), threads);
  const int64_t C = source.row_bytes / sizeof(T);
  for_each_run(B, N, source.row_bytes, threads, [&](int64_t b, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      if (source.repeated(b, n))
        sum_copies(source, next.get() + b * source.num_select, b, n, C, grad_tokens + (b * N + n) * C);
  });
}

#define EVAD_INSTANTIATE(T)                                                                                         \
  template void select_tokens<T>(const T*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t*, int32_t*, int);   \
  template void gather_tokens_backward<T>(const GatherGradRows&, int32_t*, T*, int);
EVAD_FOR_EVERY_DTYPE(EVAD_INSTANTIATE)
#undef EVAD_INSTANTIATE

}  // namespace evad
