// The Python face of the native module. It knows no framework: pointers as integers, sizes, strides in elements, a dtype
// code (host_device.h) and, for CUDA, a stream handle. Callers have checked every shape (evad_kernels/<op>.py).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
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

// Where a kernel runs: the last argument of its binding is a number of threads, or a CUDA stream's handle.
struct Cpu {
  using Argument = int;
  static int where(int threads) { return threads; }
};
struct Cuda {
  using Argument = Address;
  static Stream where(Address stream) { return pointer<CUstream_st>(stream); }
};

// Every kernel runs without the GIL.
using NoGil = py::call_guard<py::gil_scoped_release>;

template <class Device>
void bind_cell_map(py::module_& m) {
  m.def(
      "cell_map",
      [](const std::string& op, Address position, int64_t stride_b, int64_t stride_k, int64_t B, int64_t K,
         int64_t cells, Address slot, typename Device::Argument where) {
        cell_map(op, pointer<const int64_t>(position), stride_b, stride_k, B, K, cells, pointer<int32_t>(slot),
                 Device::where(where));
      },
      NoGil());
}

template <class Device>
void bind_scatter_tokens(py::module_& m) {
  m.def(
      "scatter_tokens_forward",
      [](Address tokens, int64_t stride_b, int64_t stride_k, Address slot, Address fill, bool fill_per_cell, int64_t B,
         int64_t cells, int64_t C, int dtype, Address dense, typename Device::Argument where) {
        const int64_t size = element_size(dtype);
        const ScatterRows source{pointer<const char>(tokens),  stride_b * size, stride_k * size,
                                 pointer<const int32_t>(slot), pointer<const char>(fill), fill_per_cell, cells,
                                 C * size};
        scatter_tokens_forward(source, B, pointer<char>(dense), Device::where(where));
      },
      NoGil());
  m.def(
      "scatter_tokens_backward",
      [](Address grad_dense, Address position, int64_t stride_b, int64_t stride_k, Address slot, int64_t B, int64_t K,
         int64_t cells, int64_t C, int dtype, Address grad_tokens, typename Device::Argument where) {
        const ScatterGradRows source{pointer<const char>(grad_dense), pointer<const int64_t>(position), stride_b,
                                     stride_k, pointer<const int32_t>(slot), cells, C * element_size(dtype)};
        scatter_tokens_backward(source, B, K, pointer<char>(grad_tokens), Device::where(where));
      },
      NoGil());
  m.def(
      "scatter_tokens_backward_fill",
      [](Address grad_dense, Address slot, bool fill_per_cell, int64_t B, int64_t cells, int64_t C, int dtype,
         Address grad_fill, Address partial, typename Device::Argument where) {
        with_dtype(static_cast<DType>(dtype), [&](auto zero) {
          using T = decltype(zero);
          scatter_tokens_backward_fill<T>(pointer<const T>(grad_dense), pointer<const int32_t>(slot), fill_per_cell, B,
                                          cells, C, pointer<T>(grad_fill), pointer<double>(partial),
                                          Device::where(where));
        });
      },
      NoGil());
  m.def("scatter_tokens_fill_runs", &fill_runs);
}

template <class Device>
void bind_token_selection(py::module_& m) {
  m.def(
      "select_tokens",
      [](Address importance, int64_t stride_b, int64_t stride_m, int64_t B, int64_t M, int64_t num_select, int dtype,
         Address index, typename Device::Argument where) {
        with_dtype(static_cast<DType>(dtype), [&](auto zero) {
          using T = decltype(zero);
          select_tokens<T>(pointer<const T>(importance), stride_b, stride_m, B, M, num_select, pointer<int64_t>(index),
                           Device::where(where));
        });
      },
      NoGil());
  m.def(
      "gather_tokens_forward",
      [](Address tokens, int64_t stride_b, int64_t stride_n, Address index, int64_t index_stride_b,
         int64_t index_stride_k, int64_t B, int64_t N, int64_t C, int64_t num_keyframe, int64_t num_select,
         int64_t element_size, Address kept, typename Device::Argument where) {
        const GatherRows source{pointer<const char>(tokens),
                                stride_b * element_size,
                                stride_n * element_size,
                                pointer<const int64_t>(index),
                                index_stride_b,
                                index_stride_k,
                                N,
                                num_keyframe};
        gather_tokens_forward(source, B, num_select, C * element_size, pointer<char>(kept), Device::where(where));
      },
      NoGil());
  m.def(
      "gather_tokens_backward",
      [](Address grad_kept, Address index, int64_t index_stride_b, int64_t index_stride_k, int64_t B, int64_t N,
         int64_t C, int64_t num_keyframe, int64_t num_select, int dtype, Address copies, Address grad_tokens,
         typename Device::Argument where) {
        const GatherGradRows source{pointer<const char>(grad_kept),
                                    pointer<const int64_t>(index),
                                    index_stride_b,
                                    index_stride_k,
                                    pointer<const int32_t>(copies),
                                    B,
                                    N,
                                    num_keyframe,
                                    num_select,
                                    C * element_size(dtype)};
        with_dtype(static_cast<DType>(dtype), [&](auto zero) {
          using T = decltype(zero);
          gather_tokens_backward<T>(source, pointer<int32_t>(copies), pointer<T>(grad_tokens), Device::where(where));
        });
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
  bind_cell_map<Cpu>(m);
  bind_keyframe_attention(m);
  bind_scatter_tokens<Cpu>(m);
  bind_token_selection<Cpu>(m);
#if defined(EVAD_WITH_CUDA)
  m.attr("with_cuda") = true;
  py::module_ cuda = m.def_submodule("cuda", "The same kernels on a GPU: a stream's handle where the others take threads.");
  bind_cell_map<Cuda>(cuda);
  bind_scatter_tokens<Cuda>(cuda);
  bind_token_selection<Cuda>(cuda);
#else
  m.attr("with_cuda") = false;
#endif
}
