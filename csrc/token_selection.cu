// select_tokens and gather_tokens on a GPU.
// select_tokens: one block a row. Radix selection, 8 bits a step: a histogram in shared memory, one warp finds the
// digit. Then a stable compaction: ballots, and one scan over warps. Up to kThreads * kKeysPerThread keys stay in
// registers (a row is read once, 4 M bytes); a longer row is read again for each step. Writes 8 num_select bytes, and
// 4 M for the inverse map.
// Counts are integers, so the order in which threads arrive does not show.
// gather_tokens: copy_rows (copy_rows.cuh); its backward too, except for a token that was kept more than once.
#include "copy_rows.cuh"
#include "cuda_launch.cuh"
#include "token_selection.h"

namespace evad {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kKeysPerThread = 8;
constexpr int64_t kSheet = kThreads * kKeysPerThread;  // keys of a row that are in registers at a time
constexpr unsigned kFullWarp = 0xffffffffu;

__device__ int warp_prefix(int value) {  // of lanes 0 to this one
  for (int distance = 1; distance < 32; distance *= 2) {
    const int below = __shfl_up_sync(kFullWarp, value, distance);
    if (threadIdx.x % 32 >= distance) value += below;
  }
  return value;
}

// Key i of a thread is number i * kThreads + threadIdx.x of the sheet: coalesced, and in order across warps.
template <class T>
struct Sheet {
  order_key_t<T> keys[kKeysPerThread];
  int count;  // keys of the sheet that exist

  __device__ void load(const T* row, int64_t stride, int64_t begin, int64_t M) {
    count = static_cast<int>(min(kSheet, M - begin));
#pragma unroll
    for (int i = 0; i < kKeysPerThread; ++i) {
      const int j = i * kThreads + threadIdx.x;
      keys[i] = j < count ? order_key(row[(begin + j) * stride]) : order_key_t<T>{0};
    }
  }
  __device__ bool exists(int i) const { return i * kThreads + static_cast<int>(threadIdx.x) < count; }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    select_tokens_kernel(const T* __restrict__ importance, int64_t stride_b, int64_t stride_m, int64_t M,
                         int64_t num_select, int64_t* __restrict__ index, int32_t* __restrict__ slot) {
  using Key = order_key_t<T>;
  __shared__ int32_t histogram[kDigits];
  __shared__ Selection<Key> selection;
  __shared__ int above_before[kKeysPerThread * kWarps], equal_before[kKeysPerThread * kWarps];
  __shared__ int above_in_sheet, equal_in_sheet;

  const T* const row = importance + blockIdx.x * stride_b;
  int32_t* const slots = slot == nullptr ? nullptr : slot + blockIdx.x * M;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Selection<Key> found{0, 0, static_cast<int32_t>(num_select)};  // every thread's copy of `selection`
  if (num_select == 0) found.threshold = static_cast<Key>(~Key{0});  // above every key
  Sheet<T> sheet;
  sheet.load(row, stride_m, 0, M);

  for (int shift = 8 * sizeof(Key) - kDigitBits; shift >= 0 && num_select > 0; shift -= kDigitBits) {
    for (int bin = threadIdx.x; bin < kDigits; bin += kThreads) histogram[bin] = 0;
    __syncthreads();
    for (int64_t begin = 0; begin < M; begin += kSheet) {
      if (M > kSheet) sheet.load(row, stride_m, begin, M);
#pragma unroll
      for (int i = 0; i < kKeysPerThread; ++i) {
        if (i * kThreads >= sheet.count) break;
        // Importances share their high bits: lanes of one digit add together, or all would queue at one counter.
        const bool counted = sheet.exists(i) && found.candidate(sheet.keys[i]);
        const int digit = counted ? found.digit(sheet.keys[i], shift) : kDigits;
        const unsigned same = __match_any_sync(kFullWarp, digit);
        if (counted && lane == __ffs(same) - 1) atomicAdd(histogram + digit, __popc(same));
      }
    }
    __syncthreads();
    if (warp == 0) {  // a lane has kDigits / 32 bins, lane 0 the highest
      constexpr int kBins = kDigits / 32;
      const int top = kDigits - 1 - lane * kBins;
      int in_bins = 0;
      for (int bin = 0; bin < kBins; ++bin) in_bins += histogram[top - bin];
      const int through = warp_prefix(in_bins), above = through - in_bins;
      if (above < found.rank && found.rank <= through) {  // one lane
        found.find_digit(histogram, top, above, shift);
        selection = found;
      }
    }
    __syncthreads();
    found = selection;
  }

  int above_base = 0, equal_base = 0;
  for (int64_t begin = 0; begin < M; begin += kSheet) {
    if (M > kSheet) sheet.load(row, stride_m, begin, M);
    unsigned above[kKeysPerThread], equal[kKeysPerThread];
#pragma unroll
    for (int i = 0; i < kKeysPerThread; ++i) {
      above[i] = __ballot_sync(kFullWarp, sheet.exists(i) && sheet.keys[i] > found.threshold);
      equal[i] = __ballot_sync(kFullWarp, sheet.exists(i) && sheet.keys[i] == found.threshold);
      if (lane == 0) {
        above_before[i * kWarps + warp] = __popc(above[i]);
        equal_before[i * kWarps + warp] = __popc(equal[i]);
      }
    }
    __syncthreads();
    if (warp < 2) {  // counts to prefixes, one warp each; a lane has kCounts of them
      constexpr int kCounts = kKeysPerThread * kWarps / 32;
      int* const counts = (warp == 0 ? above_before : equal_before) + lane * kCounts;
      int total = 0;
      for (int i = 0; i < kCounts; ++i) total += counts[i];
      const int through = warp_prefix(total);
      int before = through - total;
      for (int i = 0; i < kCounts; ++i) {
        const int count = counts[i];
        counts[i] = before;
        before += count;
      }
      if (lane == 31) (warp == 0 ? above_in_sheet : equal_in_sheet) = through;
    }
    __syncthreads();
    const unsigned below = (1u << lane) - 1;
#pragma unroll
    for (int i = 0; i < kKeysPerThread; ++i) {
      const int a = above_base + above_before[i * kWarps + warp] + __popc(above[i] & below);
      const int e = equal_base + equal_before[i * kWarps + warp] + __popc(equal[i] & below);
      const int place = found.place(a, e);
      const bool selected = found.place(a + (above[i] >> lane & 1), e + (equal[i] >> lane & 1)) > place;
      const int j = i * kThreads + threadIdx.x;
      if (selected) index[blockIdx.x * num_select + place] = begin + j;
      if (slots != nullptr && j < sheet.count) slots[begin + j] = selected ? place : kNoSlot;
    }
    above_base += above_in_sheet;
    equal_base += equal_in_sheet;
    __syncthreads();
  }
}

// copies [2, B, M]: the first and the last kept row of each token; one block a sample.
__global__ void __launch_bounds__(kThreads)
    find_copies_kernel(const int64_t* __restrict__ index, int64_t stride_b, int64_t stride_k, int64_t B, int64_t M,
                       int64_t num_select, int32_t* __restrict__ copies) {
  for (int64_t b = blockIdx.x; b < B; b += gridDim.x) {
    // An unsigned minimum takes any k over kNoCopy, a signed maximum too.
    auto* const first = reinterpret_cast<uint32_t*>(copies + b * M);
    int32_t* const last = copies + (B + b) * M;
    for (int64_t m = threadIdx.x; m < M; m += kThreads) first[m] = last[m] = kNoCopy;
    __syncthreads();
    for (int64_t k = threadIdx.x; k < num_select; k += kThreads) {
      const int64_t m = index[b * stride_b + k * stride_k];
      if (m < 0 || m >= M) continue;
      atomicMin(first + m, static_cast<uint32_t>(k));
      atomicMax(last + m, static_cast<int32_t>(k));
    }
  }
}

// Channel c of a repeated token.
template <class T>
__device__ T sum_of_copies(const GatherGradRows& source, int64_t b, int64_t n, int64_t c) {
  accumulate_t<T> total = 0;
  const int32_t end = *source.last(b, n);
  for (int64_t k = *source.first(b, n); k <= end; ++k)
    if (source.index[b * source.index_stride_b + k * source.index_stride_k] == n - source.num_keyframe)
      total += to_float(reinterpret_cast<const T*>(source.kept_row(b, source.num_keyframe + k))[c]);
  return from_float<T>(total);
}

// Overwrites the rows of tokens that were kept more than once; one warp a token.
template <class T>
__global__ void __launch_bounds__(256) sum_repeated_kernel(GatherGradRows source, T* __restrict__ grad_tokens) {
  const int64_t M = source.N - source.num_keyframe, C = source.row_bytes / sizeof(T);
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.y) + threadIdx.y; i < source.B * M;
       i += gridDim.x * static_cast<int64_t>(blockDim.y)) {
    const int64_t b = i / M, n = source.num_keyframe + i % M;
    if (!source.repeated(b, n)) continue;
    for (int64_t c = threadIdx.x; c < C; c += blockDim.x)
      grad_tokens[(b * source.N + n) * C + c] = sum_of_copies<T>(source, b, n, c);
  }
}

}  // namespace

template <class T>
void select_tokens(const T* importance, int64_t stride_b, int64_t stride_m, int64_t B, int64_t M, int64_t num_select,
                   int64_t* index, int32_t* slot, Stream stream) {
  const bool anything = num_select > 0 || (slot != nullptr && M > 0);
  for (int64_t b = 0; b < B && anything; b += kMaxBlocks) {
    select_tokens_kernel<T><<<blocks_for(B - b, 1), kThreads, 0, stream>>>(
        importance + b * stride_b, stride_b, stride_m, M, num_select, index + b * num_select,
        slot == nullptr ? nullptr : slot + b * M);
    check_launch("select_tokens");
  }
}

void gather_tokens_forward(const GatherRows& source, int64_t B, int64_t num_select, int64_t row_bytes, char* kept,
                           Stream stream) {
  const uint64_t alignment = address_bits(source.tokens) | source.stride_b | source.stride_n;
  copy_rows("gather_tokens", source, alignment, B, source.num_keyframe + num_select, row_bytes, kept, stream);
}

template <class T>
void gather_tokens_backward(const GatherGradRows& source, int32_t* copies, T* grad_tokens, Stream stream) {
  const int64_t B = source.B, M = source.N - source.num_keyframe;
  if (B * M > 0) {
    find_copies_kernel<<<blocks_for(B, 1), kThreads, 0, stream>>>(source.index, source.index_stride_b,
                                                                  source.index_stride_k, B, M, source.num_select,
                                                                  copies);
    check_launch("gather_tokens");
  }
  copy_rows("gather_tokens", source, address_bits(source.grad_kept), B, source.N, source.row_bytes,
            reinterpret_cast<char*>(grad_tokens), stream);
  if (B * M > 0) {
    sum_repeated_kernel<T><<<blocks_for(B * M, 8), dim3(32, 8), 0, stream>>>(source, grad_tokens);
    check_launch("gather_tokens");
  }
}

#define EVAD_INSTANTIATE(T)                                                                                    \
  template void select_tokens<T>(const T*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t*, int32_t*, Stream); \
  template void gather_tokens_backward<T>(const GatherGradRows&, int32_t*, T*, Stream);
EVAD_FOR_EVERY_DTYPE(EVAD_INSTANTIATE)
#undef EVAD_INSTANTIATE

}  // namespace evad
