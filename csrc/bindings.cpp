// The Python face of the native module. It knows no framework: pointers as integers, sizes, strides in elements, a dtype
// code (host_device.h) and, for CUDA, a stream handle. Callers have checked every shape (evad_kernels/<op>.py).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cell_map.h"
#include "cpu_isa.h"
#include "host_device.h"
#include "keyframe_attention.h"
#include "scatter_tokens.h"
#include "token_selection.h"

namespace py = pybind11;
using namespace evad;

namespace {

using Address = std::uintptr_t;  // of a tensor's first element; 0 for None

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

int64_t element_size(int dtype) {
  int64_t size = 0;
  with_dtype(static_cast<DType>(dtype), [&](auto zero) { size = sizeof zero; });
  return size;
}

void require_in_range(const RangeCheck& check, const std::string& argument, int64_t limit) {
  if (!check.valid)
    throw std::invalid_argument(argument + " must be in [0, " + std::to_string(limit) + "), got " +
                                std::to_string(check.offending));
}

// Every kernel runs without the GIL.
using NoGil = py::call_guard<py::gil_scoped_release>;

void bind_cell_map(py::module_& m) {
  m.def(
      "cell_map",
      [](const std::string& op, Address position, int64_t stride_b, int64_t stride_k, int64_t B, int64_t K,
         int64_t cells, Address slot, int threads) {
        require_in_range(
            cell_map(pointer<const int64_t>(position), stride_b, stride_k, B, K, cells, pointer<int32_t>(slot), threads),
            op + ": position", cells);
      },
      NoGil());
}

void bind_scatter_tokens(py::module_& m) {
  m.def(
      "scatter_tokens_forward",
      [](Address tokens, int64_t stride_b, int64_t stride_k, Address slot, Address fill, bool fill_per_cell, int64_t B,
         int64_t cells, int64_t C, int dtype, Address dense, int threads) {
        const int64_t size = element_size(dtype);
        scatter_tokens_forward(pointer<const char>(tokens), stride_b * size, stride_k * size,
                               pointer<const int32_t>(slot), pointer<const char>(fill), fill_per_cell, B, cells,
                               C * size, pointer<char>(dense), threads);
      },
      NoGil());
  m.def(
      "scatter_tokens_backward",
      [](Address grad_dense, Address position, int64_t stride_b, int64_t stride_k, Address slot, int64_t B, int64_t K,
         int64_t cells, int64_t C, int dtype, Address grad_tokens, int threads) {
        scatter_tokens_backward(pointer<const char>(grad_dense), pointer<const int64_t>(position), stride_b, stride_k,
                                pointer<const int32_t>(slot), B, K, cells, C * element_size(dtype),
                                pointer<char>(grad_tokens), threads);
      },
      NoGil());
  m.def(
      "scatter_tokens_backward_fill",
      [](Address grad_dense, Address slot, bool fill_per_cell, int64_t B, int64_t cells, int64_t C, int dtype,
         Address grad_fill, int threads) {
        with_dtype(static_cast<DType>(dtype), [&](auto zero) {
          using T = decltype(zero);
          scatter_tokens_backward_fill<T>(pointer<const T>(grad_dense), pointer<const int32_t>(slot), fill_per_cell, B,
                                          cells, C, pointer<T>(grad_fill), threads);
        });
      },
      NoGil());
}

void bind_token_selection(py::module_& m) {
  m.def(
      "select_tokens",
      [](Address importance, int64_t stride_b, int64_t stride_m, int64_t B, int64_t M, int64_t num_select, int dtype,
         Address index, int threads) {
        with_dtype(static_cast<DType>(dtype), [&](auto zero) {
          using T = decltype(zero);
          select_tokens<T>(pointer<const T>(importance), stride_b, stride_m, B, M, num_select, pointer<int64_t>(index),
                           threads);
        });
      },
      NoGil());
  m.def(
      "gather_tokens_forward",
      [](Address tokens, int64_t stride_b, int64_t stride_n, Address index, int64_t index_stride_b,
         int64_t index_stride_k, int64_t B, int64_t N, int64_t C, int64_t num_keyframe, int64_t num_select,
         int64_t element_size, Address kept, int threads) {
        const RangeCheck check = gather_tokens_forward(
            pointer<const char>(tokens), stride_b * element_size, stride_n * element_size,
            pointer<const int64_t>(index), index_stride_b, index_stride_k, B, N, num_keyframe, num_select,
            C * element_size, pointer<char>(kept), threads);
        require_in_range(check, "gather_tokens: index", N - num_keyframe);
      },
      NoGil());
  m.def(
      "gather_tokens_backward",
      [](Address grad_kept, Address index, int64_t index_stride_b, int64_t index_stride_k, int64_t B, int64_t N,
         int64_t C, int64_t num_keyframe, int64_t num_select, int dtype, Address grad_tokens, int threads) {
        RangeCheck check{};
        with_dtype(static_cast<DType>(dtype), [&](auto zero) {
          using T = decltype(zero);
          check = gather_tokens_backward<T>(pointer<const T>(grad_kept), pointer<const int64_t>(index), index_stride_b,
                                            index_stride_k, B, N, num_keyframe, num_select, C,
                                            pointer<T>(grad_tokens), threads);
        });
        require_in_range(check, "gather_tokens: index", N - num_keyframe);
      },
      NoGil());
}

// (address, stride_b, stride_h, stride_n) of a tensor [B, H, rows, D], strides in elements.
using PackedRows = std::array<int64_t, 4>;

HeadRows head_rows(const PackedRows& packed) {
  return {pointer<char>(static_cast<Address>(packed[0])), packed[1], packed[2], packed[3]};
}

void bind_keyframe_attention(py::module_& m) {
  m.def("cpu_isa", [] { return isa_name(cpu_isa()); });
  m.def("detected_isa", [] { return isa_name(detected_isa()); });
  m.def("set_isa_cap", &set_isa_cap);
  m.def(
      "keyframe_attention_forward",
      [](const std::array<int64_t, 5>& sizes, double scale, double keyframe_weight, int dtype, const PackedRows& query,
         const PackedRows& key, const PackedRows& value, const PackedRows& output, Address lse, Address importance,
         int threads) {
        const AttentionShape shape = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], scale, keyframe_weight,
                                      static_cast<DType>(dtype)};
        keyframe_attention_forward(shape, head_rows(query), head_rows(key), head_rows(value), head_rows(output),
                                   pointer<void>(lse), pointer<void>(importance), threads);
      },
      NoGil());
  m.def(
      "keyframe_attention_backward",
      [](const std::array<int64_t, 5>& sizes, double scale, double keyframe_weight, int dtype, const PackedRows& query,
         const PackedRows& key, const PackedRows& value, const PackedRows& grad_output, Address lse,
         Address grad_importance, Address index, int64_t num_select, const PackedRows& grad_query,
         const PackedRows& grad_key, const PackedRows& grad_value, int threads) {
        const AttentionShape shape = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], scale, keyframe_weight,
                                      static_cast<DType>(dtype)};
        keyframe_attention_backward(shape, head_rows(query), head_rows(key), head_rows(value), head_rows(grad_output),
                                    pointer<void>(lse), pointer<void>(grad_importance), pointer<const int64_t>(index),
                                    num_select, head_rows(grad_query), head_rows(grad_key), head_rows(grad_value),
                                    threads);
      },
      NoGil());
  m.def(
      "keep_rows",
      [](Address tokens, int64_t B, int64_t N, int64_t row_bytes, int64_t num_keyframe, Address index,
         int64_t num_select, int threads) {
        keep_rows(pointer<char>(tokens), B, N, row_bytes, num_keyframe, pointer<const int64_t>(index), num_select,
                  threads);
      },
      NoGil());
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU and CUDA kernels of evad_kernels; call them through the package.";
#if defined(EVAD_WITH_CUDA)
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
  bind_cell_map(m);
  bind_keyframe_attention(m);
  bind_scatter_tokens(m);
  bind_token_selection(m);
}
