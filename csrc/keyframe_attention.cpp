// Forward: in parts, one a (batch, head, 288 rows). Backward: one a (batch, head). A thread takes head after head, so K
// and V are packed about once, and helps with what is left of others in the end. The cut into parts never depends on the
// number of threads, and neither does any sum.
#include "keyframe_attention.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "cpu_isa.h"
#include "keyframe_attention_kernels.h"
#include "parallel.h"

namespace evad {
namespace {

constexpr int64_t kRowsPerPart = 288;  // a multiple of every kernel's block of rows

int64_t parts_per_head(int64_t N) { return (N + kRowsPerPart - 1) / kRowsPerPart; }

const AttentionKernels& kernels(DType dtype, int64_t D) {
  const Isa isa = cpu_isa();
  const AttentionKernels* table = nullptr;
#if defined(EVAD_AMX)
  if (isa >= Isa::amx) table = amx::attention_kernels(dtype, D);
#endif
#if defined(EVAD_AVX512)
  if (!table && isa >= Isa::avx512) table = avx512::attention_kernels(dtype, D);
#endif
#if defined(EVAD_AVX2)
  if (!table && isa >= Isa::avx2) table = avx2::attention_kernels(dtype, D);
#endif
  if (!table) table = baseline::attention_kernels(dtype, D);
  (void)isa;
  return *table;
}

// 64-byte aligned and not initialised: pages that a kernel never touches stay free.
class Workspaces {
 public:
  Workspaces(size_t bytes, int64_t workers)
      : stride_((bytes + 4095) / 4096 * 4096),
        data_(static_cast<char*>(std::aligned_alloc(64, std::max<size_t>(stride_, 64) * workers))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Workspaces() { std::free(data_); }
  Workspaces(const Workspaces&) = delete;
  Workspaces& operator=(const Workspaces&) = delete;
  char* of(int64_t worker) const { return data_ + worker * stride_; }

 private:
  size_t stride_;
  char* data_;
};

// All, or one for less than a million multiply-adds: waking the others costs as much. Results do not depend on it.
int useful_threads(const AttentionShape& s, int threads) {
  return static_cast<double>(s.B) * s.H * s.N * s.N * s.D < (1 << 20) ? 1 : threads;
}

// body(head, part, workspace, same_head) for all parts of all heads; same_head: the workspace was last used for it.
template <class Body>
void for_each_part(int64_t heads, int64_t parts, size_t workspace_bytes, int threads, const Body& body) {
  const int64_t workers = std::min<int64_t>(threads, heads * parts);
  const Workspaces workspaces(workspace_bytes, workers);
  std::atomic<int64_t> next_head{0};
  std::vector<std::atomic<int64_t>> next_part(heads);
  parallel_for(workers, threads, [&](int64_t worker) {
    int64_t last = -1;
    const auto finish = [&](int64_t head) {
      for (int64_t part = next_part[head]++; part < parts; part = next_part[head]++) {
        body(head, part, workspaces.of(worker), head == last);
        last = head;
      }
    };
    for (int64_t head = next_head++; head < heads; head = next_head++) finish(head);
    for (int64_t head = heads - 1; head >= 0; --head) finish(head);
  });
}

char* head(const HeadRows& rows, int64_t b, int64_t h, int64_t element) {
  return rows.data ? rows.data + (b * rows.stride_b + h * rows.stride_h) * element : nullptr;
}

// importance = c * the partial sums, in the order head, part.
template <class C>
void add_partial_sums(const double* partial, const AttentionShape& s, C* importance, int threads) {
  constexpr int64_t kColumns = 256;
  const int64_t M = s.N - s.num_keyframe, parts = s.H * parts_per_head(s.N), runs = (M + kColumns - 1) / kColumns;
  const double c = 1.0 / (static_cast<double>(s.N) * static_cast<double>(s.H));
  parallel_for(s.B * runs, threads, [&](int64_t task) {
    const int64_t b = task / runs, begin = task % runs * kColumns, count = std::min(kColumns, M - begin);
    double sum[kColumns] = {};
    for (int64_t part = 0; part < parts; ++part) {
      const double* row = partial + (b * parts + part) * M + begin;
      for (int64_t j = 0; j < count; ++j) sum[j] += row[j];
    }
    for (int64_t j = 0; j < count; ++j) importance[b * M + begin + j] = static_cast<C>(c * sum[j]);
  });
}

}  // namespace

void keyframe_attention_forward(const AttentionShape& s, const HeadRows& query, const HeadRows& key,
                                const HeadRows& value, const HeadRows& output, void* lse, void* importance,
                                int threads) {
  const AttentionKernels& table = kernels(s.dtype, s.D);
  const int64_t M = s.N - s.num_keyframe, parts = parts_per_head(s.N), heads = s.B * s.H;
  const int64_t element = element_size(s.dtype), lse_element = s.dtype == DType::float64 ? 8 : 4;
  if (heads * parts == 0) return;
  threads = useful_threads(s, threads);
  const std::unique_ptr<double[]> partial(M > 0 ? new double[heads * parts * M] : nullptr);
  const auto forward = [&](int64_t head_index, int64_t part, char* workspace, bool same_head) {
    const int64_t b = head_index / s.H, h = head_index % s.H, begin = part * kRowsPerPart;
    AttentionForwardTask t;
    t.query = head(query, b, h, element), t.query_stride = query.stride_n;
    t.key = head(key, b, h, element), t.key_stride = key.stride_n;
    t.value = head(value, b, h, element), t.value_stride = value.stride_n;
    t.N = s.N, t.D = s.D, t.num_keyframe = s.num_keyframe;
    t.row_begin = begin, t.row_end = std::min(s.N, begin + kRowsPerPart);
    t.scale = s.scale, t.keyframe_weight = s.keyframe_weight;
    t.output = head(output, b, h, element), t.output_stride = output.stride_n;
    t.lse = static_cast<char*>(lse) + (b * s.H + h) * s.N * lse_element;
    t.column_sum = partial ? partial.get() + (head_index * parts + part) * M : nullptr;
    t.same_head = same_head;
    table.forward(t, workspace);
  };
  for_each_part(heads, parts, table.forward_workspace(s.N, s.D), threads, forward);
  if (M == 0) return;
  if (s.dtype == DType::float64)
    add_partial_sums(partial.get(), s, static_cast<double*>(importance), threads);
  else
    add_partial_sums(partial.get(), s, static_cast<float*>(importance), threads);
}

void keyframe_attention_backward(const AttentionShape& s, const HeadRows& query, const HeadRows& key,
                                 const HeadRows& value, const HeadRows& grad_output, const void* lse,
                                 const void* grad_importance, const int64_t* index, int64_t num_select,
                                 const HeadRows& grad_query, const HeadRows& grad_key, const HeadRows& grad_value,
                                 int threads) {
  const AttentionKernels& table = kernels(s.dtype, s.D);
  const int64_t M = s.N - s.num_keyframe, K = s.num_keyframe + num_select;
  const int64_t element = element_size(s.dtype), sum_element = s.dtype == DType::float64 ? 8 : 4;
  if (s.B * s.H == 0) return;
  threads = useful_threads(s, threads);

  // The rows that take part, and where in grad_output each one is.
  const bool all = grad_importance != nullptr && M > 0;
  const int64_t R = all ? s.N : grad_output.data ? K : 0;
  std::vector<int32_t> row(s.B * R), slot(s.B * R, -1);
  for (int64_t b = 0; b < s.B && R > 0; ++b) {
    int32_t *rows = row.data() + b * R, *slots = slot.data() + b * R;
    if (all)
      for (int64_t i = 0; i < s.N; ++i) rows[i] = static_cast<int32_t>(i);
    for (int64_t k = 0; k < K; ++k) {
      const int64_t token = index && k >= s.num_keyframe
                                ? s.num_keyframe + index[b * num_select + k - s.num_keyframe]
                                : k;
      const int64_t r = all ? token : k;
      rows[r] = static_cast<int32_t>(token);
      if (grad_output.data) slots[r] = static_cast<int32_t>(k);
    }
  }

  const auto backward = [&](int64_t head_index, int64_t, char* workspace, bool) {
    const int64_t b = head_index / s.H, h = head_index % s.H;
    AttentionBackwardTask t;
    t.query = head(query, b, h, element), t.query_stride = query.stride_n;
    t.key = head(key, b, h, element), t.key_stride = key.stride_n;
    t.value = head(value, b, h, element), t.value_stride = value.stride_n;
    t.N = s.N, t.D = s.D, t.num_keyframe = s.num_keyframe;
    t.scale = s.scale, t.keyframe_weight = s.keyframe_weight;
    t.row = row.data() + b * R, t.slot = slot.data() + b * R, t.R = R;
    t.grad_output = head(grad_output, b, h, element), t.grad_output_stride = grad_output.stride_n;
    t.lse = static_cast<const char*>(lse) + head_index * s.N * sum_element;
    t.grad_importance = all ? static_cast<const char*>(grad_importance) + b * M * sum_element : nullptr;
    t.importance_scale = 1.0 / (static_cast<double>(s.N) * static_cast<double>(s.H));
    t.grad_query = head(grad_query, b, h, element), t.grad_query_stride = grad_query.stride_n;
    t.grad_key = head(grad_key, b, h, element), t.grad_key_stride = grad_key.stride_n;
    t.grad_value = head(grad_value, b, h, element), t.grad_value_stride = grad_value.stride_n;
    table.backward(t, workspace);
  };
  for_each_part(s.B * s.H, 1, table.backward_workspace(s.N, s.D), threads, backward);
}

void keep_rows(char* tokens, int64_t B, int64_t N, int64_t row_bytes, int64_t num_keyframe, const int64_t* index,
               int64_t num_select, int threads) {
  // Every row moves towards the front and none overtakes another: one pass in order is safe. Threads share the columns.
  const int64_t K = num_keyframe + num_select, lines = (row_bytes + 63) / 64;
  const int64_t workers = std::min<int64_t>(threads, lines);
  parallel_for(workers, threads, [&](int64_t worker) {
    const int64_t begin = lines * worker / workers * 64, end = std::min(row_bytes, lines * (worker + 1) / workers * 64);
    for (int64_t b = 0; b < B; ++b)
      for (int64_t k = 0; k < K; ++k) {
        const int64_t from = k < num_keyframe ? k : num_keyframe + index[b * num_select + k - num_keyframe];
        std::memmove(tokens + (b * K + k) * row_bytes + begin, tokens + (b * N + from) * row_bytes + begin,
                     end - begin);
      }
  });
}

}  // namespace evad
