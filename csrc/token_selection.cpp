// select_tokens: one task a row, radix selection on integer keys, then one pass in order.
// gather_tokens: one task a run of rows; a row is one memcpy.
#include "token_selection.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "parallel.h"

namespace evad {
namespace {

constexpr int64_t kKeysPerThread = 4096;  // a row costs some 2 ns a key, waking the threads some 5 us

template <class Key>
int bit_width(Key bits) {
  int width = 0;
  for (; bits != 0; bits = static_cast<Key>(bits >> 1)) ++width;
  return width;
}

// The num_select-th largest of keys[0:M], num_select >= 1, and how many of those equal to it are selected.
template <class Key>
Selection<Key> find_threshold(const Key* keys, int64_t M, int64_t num_select, Key* candidates) {
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
    int digit = kDigits - 1;
    int64_t above = 0;
    while (above + histogram[digit] < selection.rank) above += histogram[digit--];
    selection.fix(digit, shift, above);
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
void select_row(const T* importance, int64_t stride, int64_t M, int64_t num_select, int64_t* index) {
  using Key = order_key_t<T>;
  const std::unique_ptr<Key[]> scratch(new Key[2 * M]);
  Key* const keys = scratch.get();
  if (stride == 1)
    for (int64_t j = 0; j < M; ++j) keys[j] = order_key(importance[j]);
  else
    for (int64_t j = 0; j < M; ++j) keys[j] = order_key(importance[j * stride]);
  const Selection<Key> selection = find_threshold(keys, M, num_select, keys + M);
  int64_t count = 0, equal = 0;
  for (int64_t j = 0; count < num_select; ++j) {
    index[count] = j;
    count += selection.selected(keys[j], equal);
    equal += keys[j] == selection.threshold;
  }
}

constexpr int64_t kRowsPerTask = 64;
constexpr int64_t kBytesPerThread = 131072;  // copied in some 10 us, twice what waking the threads costs

// body(b, row) for all rows of all samples, in runs that fill a task.
template <class Body>
void for_each_row(int64_t B, int64_t rows, int64_t row_bytes, int threads, const Body& body) {
  const int64_t runs = (rows + kRowsPerTask - 1) / kRowsPerTask;
  const auto run = [&](int64_t task) {
    const int64_t b = task / runs, begin = task % runs * kRowsPerTask;
    const int64_t end = std::min(rows, begin + kRowsPerTask);
    for (int64_t row = begin; row < end; ++row) body(b, row);
  };
  parallel_for(B * runs, threads, run, kBytesPerThread / (kRowsPerTask * row_bytes + 1));
}

}  // namespace

template <class T>
void select_tokens(const T* importance, int64_t stride_b, int64_t stride_m, int64_t B, int64_t M, int64_t num_select,
                   int64_t* index, int threads) {
  if (num_select == 0) return;
  parallel_for(
      B, threads,
      [&](int64_t b) { select_row(importance + b * stride_b, stride_m, M, num_select, index + b * num_select); },
      kKeysPerThread / M);
}

RangeCheck gather_tokens_forward(const char* tokens, int64_t stride_b, int64_t stride_n, const int64_t* index,
                                 int64_t index_stride_b, int64_t index_stride_k, int64_t B, int64_t N,
                                 int64_t num_keyframe, int64_t num_select, int64_t row_bytes, char* kept, int threads) {
  const RangeCheck check = check_range(index, index_stride_b, index_stride_k, B, num_select, N - num_keyframe);
  if (!check.valid) return check;
  const int64_t rows = num_keyframe + num_select;
  const auto copy = [&](auto bytes) {
    for_each_row(B, rows, row_bytes, threads, [&](int64_t b, int64_t row) {
      const int64_t k = row - num_keyframe;
      const int64_t n = k < 0 ? row : num_keyframe + index[b * index_stride_b + k * index_stride_k];
      std::memcpy(kept + (b * rows + row) * row_bytes, tokens + b * stride_b + n * stride_n, bytes);
    });
  };
  switch (row_bytes) {  // a memcpy of known size is a load and a store: masks and positions
    case 1: copy(std::integral_constant<size_t, 1>{}); break;
    case 4: copy(std::integral_constant<size_t, 4>{}); break;
    case 8: copy(std::integral_constant<size_t, 8>{}); break;
    default: copy(static_cast<size_t>(row_bytes));
  }
  return check;
}

template <class T>
RangeCheck gather_tokens_backward(const T* grad_kept, const int64_t* index, int64_t index_stride_b,
                                  int64_t index_stride_k, int64_t B, int64_t N, int64_t num_keyframe,
                                  int64_t num_select, int64_t C, T* grad_tokens, int threads) {
  const int64_t M = N - num_keyframe, rows = num_keyframe + num_select;
  const RangeCheck check = check_range(index, index_stride_b, index_stride_k, B, num_select, M);
  if (!check.valid) return check;
  // The kept rows that copy token m: first[m], next[first[m]], ... ascending, to the end at -1.
  std::vector<int64_t> first(B * M, -1), next(B * num_select);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t k = num_select - 1; k >= 0; --k) {
      int64_t& head = first[b * M + index[b * index_stride_b + k * index_stride_k]];
      next[b * num_select + k] = head;
      head = k;
    }
  for_each_row(B, N, C * sizeof(T), threads, [&](int64_t b, int64_t n) {
    T* const out = grad_tokens + (b * N + n) * C;
    const T* const grad = grad_kept + b * rows * C;
    if (n < num_keyframe) {
      std::memcpy(out, grad + n * C, C * sizeof(T));
      return;
    }
    const int64_t* const following = next.data() + b * num_select;
    const int64_t k = first[b * M + n - num_keyframe];
    if (k < 0)
      std::memset(out, 0, C * sizeof(T));
    else if (following[k] < 0)
      std::memcpy(out, grad + (num_keyframe + k) * C, C * sizeof(T));
    else
      for (int64_t c = 0; c < C; ++c) {
        accumulate_t<T> sum = 0;
        for (int64_t copy = k; copy >= 0; copy = following[copy]) sum += to_float(grad[(num_keyframe + copy) * C + c]);
        out[c] = from_float<T>(sum);
      }
  });
  return check;
}

#define EVAD_INSTANTIATE(T)                                                                                           \
  template void select_tokens<T>(const T*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t*, int);               \
  template RangeCheck gather_tokens_backward<T>(const T*, const int64_t*, int64_t, int64_t, int64_t, int64_t, int64_t, \
                                                int64_t, int64_t, T*, int);
EVAD_INSTANTIATE(float)
EVAD_INSTANTIATE(double)
EVAD_INSTANTIATE(float16)
EVAD_INSTANTIATE(bfloat16)
#undef EVAD_INSTANTIATE

}  // namespace evad
