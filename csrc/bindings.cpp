// The Python face of the native module. It knows no framework: pointers as integers, sizes, strides in elements, a dtype
// code (host_device.h) and, for CUDA, a stream handle. Callers have checked every shape (evad_kernels/<op>.py).
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cell_map.h"
#include "host_device.h"
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

// Every kernel runs without the GIL.
using NoGil = py::call_guard<py::gil_scoped_release>;

void bind_cell_map(py::module_& m) {
  m.def(
      "cell_map",
      [](const std::string& op, Address position, int64_t stride_b, int64_t stride_k, int64_t B, int64_t K,
         int64_t cells, Address slot, int threads) {
        const CellMapResult result =
            cell_map(pointer<const int64_t>(position), stride_b, stride_k, B, K, cells, pointer<int32_t>(slot), threads);
        if (!result.valid)
          throw std::invalid_argument(op + ": position must be in [0, " + std::to_string(cells) + "), got " +
                                      std::to_string(result.offending));
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
  bind_scatter_tokens(m);
  bind_token_selection(m);
}
