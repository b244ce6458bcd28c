// The Python face of the native module. It knows no framework: pointers as integers, sizes, strides in elements, a
// dtype code (host_device.h) and, for CUDA, a stream handle. Callers have checked every shape (evad_kernels/<op>.py).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "cell_map.h"
#include "cpu_isa.h"
#include "host_device.h"
#include "keyframe_attention.h"
#include "pyramid_roi_align.h"
#include "roi_align_3d.h"
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

void bind_cpu_isa(py::module_& m) {
  m.def("cpu_isa", [] { return isa_name(cpu_isa()); });
  m.def("detected_isa", [] { return isa_name(detected_isa()); });
  m.def("set_isa_cap", &set_isa_cap);
}

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
        const int64_t size = element_size(static_cast<DType>(dtype));
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
                                     stride_k, pointer<const int32_t>(slot), cells,
                                     C * element_size(static_cast<DType>(dtype))};
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
         Address index, Address slot, typename Device::Argument where) {
        with_dtype(static_cast<DType>(dtype), [&](auto zero) {
          using T = decltype(zero);
          select_tokens<T>(pointer<const T>(importance), stride_b, stride_m, B, M, num_select, pointer<int64_t>(index),
                           pointer<int32_t>(slot), Device::where(where));
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
                                    C * element_size(static_cast<DType>(dtype))};
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

// (corners, corners are double, batch or 0, R, frames)
using PackedBoxes = std::tuple<Address, bool, Address, int64_t, int64_t>;

RoiBoxes roi_boxes(const PackedBoxes& packed) {
  const auto& [corners, is_double, batch, R, frames] = packed;
  return {pointer<void>(corners), is_double, pointer<const int64_t>(batch), R, frames};
}

// (oh, ow, sampling_ratio, aligned)
using PackedSampling = std::tuple<int64_t, int64_t, int64_t, bool>;

RoiSampling roi_sampling(const PackedSampling& packed) {
  const auto& [oh, ow, sampling_ratio, aligned] = packed;
  return {oh, ow, sampling_ratio, aligned};
}

// (tokens, stride_b, stride_k, slot, background, background is per cell), (B, K, C, T, Gh, Gw)
using PackedTokens = std::tuple<Address, int64_t, int64_t, Address, Address, bool>;

template <class F>
TokenGrid<F> token_grid(const PackedTokens& packed, const std::array<int64_t, 6>& sizes) {
  const auto& [tokens, stride_b, stride_k, slot, background, per_cell] = packed;
  const auto& [B, K, C, T, Gh, Gw] = sizes;
  return {pointer<const F>(tokens), stride_b, stride_k, pointer<const int32_t>(slot), pointer<const F>(background),
          per_cell, B, K, C, T, Gh, Gw};
}

void bind_roi_align_3d(py::module_& m) {
  m.def(
      "roi_align_3d_forward",
      [](const PackedTokens& tokens, const std::array<int64_t, 6>& sizes, const PackedBoxes& boxes,
         const PackedSampling& sampling, double cells_per_pixel, int dtype, Address samples, int threads) {
        with_dtype(static_cast<DType>(dtype), [&](auto zero) {
          using T = decltype(zero);
          roi_align_3d_forward<T>(token_grid<accumulate_t<T>>(tokens, sizes), roi_boxes(boxes),
                                  {roi_sampling(sampling), cells_per_pixel}, pointer<T>(samples), threads);
        });
      },
      NoGil());
  m.def(
      "roi_pool_3d_forward",
      [](const PackedTokens& tokens, const std::array<int64_t, 6>& sizes, const PackedBoxes& boxes,
         const PackedSampling& sampling, double cells_per_pixel, int dtype, Address pooled, Address largest,
         int threads) {
        with_dtype(static_cast<DType>(dtype), [&](auto zero) {
          using T = decltype(zero);
          roi_pool_3d_forward<T>(token_grid<accumulate_t<T>>(tokens, sizes), roi_boxes(boxes),
                                 {roi_sampling(sampling), cells_per_pixel}, pointer<T>(pooled),
                                 pointer<void>(largest), threads);
        });
      },
      NoGil());
  m.def(
      "roi_3d_backward",
      [](Address slot, bool background_per_cell, const std::array<int64_t, 6>& sizes, const PackedBoxes& boxes,
         const PackedSampling& sampling, double cells_per_pixel, int dtype, Address grad, Address largest,
         Address grad_tokens, Address grad_background, int threads) {
        with_dtype(static_cast<DType>(dtype), [&](auto zero) {
          using T = decltype(zero);
          const PackedTokens tokens = {0, 0, 0, slot, 0, background_per_cell};
          roi_3d_backward<T>(token_grid<accumulate_t<T>>(tokens, sizes), roi_boxes(boxes),
                             {roi_sampling(sampling), cells_per_pixel}, pointer<const T>(grad),
                             pointer<const void>(largest), pointer<T>(grad_tokens), pointer<T>(grad_background),
                             threads);
        });
      },
      NoGil());
}

#if defined(EVAD_WITH_CUDA)
// (order, begin), or zeros
using PackedRoiRows = std::array<Address, 2>;

RoiRows roi_rows(const PackedRoiRows& packed) {
  return {pointer<const int64_t>(packed[0]), pointer<const int64_t>(packed[1])};
}

void bind_roi_pool_3d_cuda(py::module_& m) {
  m.def("roi_pool_3d_work", [](bool background_per_cell, const std::array<int64_t, 6>& sizes, const PackedBoxes& boxes,
                               const PackedSampling& sampling, int dtype, bool grad_background) {
    int64_t bytes = 0;
    with_dtype(static_cast<DType>(dtype), [&](auto zero) {
      using T = decltype(zero);
      bytes = roi_pool_3d_work<T>(token_grid<T>({0, 0, 0, 0, 0, background_per_cell}, sizes), roi_boxes(boxes),
                                  roi_sampling(sampling), grad_background);
    });
    return bytes;
  });
  m.def(
      "roi_pool_3d_forward",
      [](const PackedTokens& tokens, const std::array<int64_t, 6>& sizes, const PackedBoxes& boxes,
         const PackedRoiRows& rows, const PackedSampling& sampling, double cells_per_pixel, int dtype, Address pooled,
         Address largest, Address work, Address stream) {
        with_dtype(static_cast<DType>(dtype), [&](auto zero) {
          using T = decltype(zero);
          roi_pool_3d_forward<T>(token_grid<T>(tokens, sizes), roi_boxes(boxes), roi_rows(rows),
                                 {roi_sampling(sampling), cells_per_pixel}, pointer<T>(pooled), pointer<void>(largest),
                                 pointer<void>(work), Cuda::where(stream));
        });
      },
      NoGil());
  m.def(
      "roi_pool_3d_backward",
      [](Address slot, bool background_per_cell, const std::array<int64_t, 6>& sizes, const PackedBoxes& boxes,
         const PackedRoiRows& rows, const PackedSampling& sampling, double cells_per_pixel, int dtype,
         Address grad_pooled, Address largest, Address grad_tokens, Address grad_background, Address work,
         Address stream) {
        with_dtype(static_cast<DType>(dtype), [&](auto zero) {
          using T = decltype(zero);
          roi_pool_3d_backward<T>(token_grid<T>({0, 0, 0, slot, 0, background_per_cell}, sizes), roi_boxes(boxes),
                                  roi_rows(rows), {roi_sampling(sampling), cells_per_pixel},
                                  pointer<const T>(grad_pooled), pointer<const void>(largest), pointer<T>(grad_tokens),
                                  pointer<T>(grad_background), pointer<void>(work), Cuda::where(stream));
        });
      },
      NoGil());
}
#endif

// (data, stride_b, stride_c, stride_h, stride_w, h, w, pixels_per_cell)
using PackedLevel = std::tuple<Address, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, double>;
// (B, C, canonical_size, canonical_level, number of the finest level)
using PackedPyramid = std::tuple<int64_t, int64_t, double, int64_t, int64_t>;

std::vector<PyramidLevel> pyramid_levels(const std::vector<PackedLevel>& packed) {
  std::vector<PyramidLevel> levels;
  for (const auto& [data, stride_b, stride_c, stride_h, stride_w, h, w, pixels_per_cell] : packed)
    levels.push_back({pointer<void>(data), stride_b, stride_c, stride_h, stride_w, h, w, pixels_per_cell});
  return levels;
}

Pyramid pyramid_of(const std::vector<PyramidLevel>& levels, const PackedPyramid& packed) {
  const auto& [B, C, canonical_size, canonical_level, first] = packed;
  return {levels.data(), static_cast<int64_t>(levels.size()), B, C, canonical_size, canonical_level, first};
}

void bind_pyramid_roi_align(py::module_& m) {
  m.def(
      "pyramid_roi_align_forward",
      [](const std::vector<PackedLevel>& packed, const PackedPyramid& pyramid, const PackedBoxes& boxes,
         const PackedSampling& sampling, int dtype, Address samples, int threads) {
        const std::vector<PyramidLevel> levels = pyramid_levels(packed);
        with_dtype(static_cast<DType>(dtype), [&](auto zero) {
          using T = decltype(zero);
          pyramid_roi_align_forward<T>(pyramid_of(levels, pyramid), roi_boxes(boxes),
                                       roi_sampling(sampling), pointer<T>(samples), threads);
        });
      },
      NoGil());
  m.def(
      "pyramid_roi_align_backward",
      [](const std::vector<PackedLevel>& packed, const PackedPyramid& pyramid, const PackedBoxes& boxes,
         const PackedSampling& sampling, int dtype, Address grad_samples, int threads) {
        const std::vector<PyramidLevel> levels = pyramid_levels(packed);
        with_dtype(static_cast<DType>(dtype), [&](auto zero) {
          using T = decltype(zero);
          pyramid_roi_align_backward<T>(pyramid_of(levels, pyramid), roi_boxes(boxes),
                                        roi_sampling(sampling), pointer<const T>(grad_samples),
                                        threads);
        });
      },
      NoGil());
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU and CUDA kernels of evad_kernels; call them through the package.";
#if defined(EVAD_BUILD_DIGEST)
  m.attr("build_digest") = EVAD_BUILD_DIGEST;  // setup.py does not build again what it finds in here
#endif
#if defined(_OPENMP)
  m.attr("with_openmp") = true;
#else
  m.attr("with_openmp") = false;
#endif
  bind_cpu_isa(m);
  bind_cell_map<Cpu>(m);
  bind_keyframe_attention(m);
  bind_pyramid_roi_align(m);
  bind_roi_align_3d(m);
  bind_scatter_tokens<Cpu>(m);
  bind_token_selection<Cpu>(m);
#if defined(EVAD_WITH_CUDA)
  m.attr("with_cuda") = true;
  py::module_ cuda = m.def_submodule("cuda", "The same kernels on a GPU; a stream's handle for the threads.");
  bind_cell_map<Cuda>(cuda);
  bind_roi_pool_3d_cuda(cuda);
  bind_scatter_tokens<Cuda>(cuda);
  bind_token_selection<Cuda>(cuda);
#else
  m.attr("with_cuda") = false;
#endif
}
