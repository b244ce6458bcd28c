// cell_map on a GPU: one block a sample. Reads 8 K, writes 4 cells + 4 K bytes a sample; a maximum of integers, so the
// order in which threads arrive does not show.
#include "cell_map.h"
#include "cuda_launch.cuh"

namespace evad {
namespace {

constexpr int kThreads = 1024;

__global__ void __launch_bounds__(kThreads) cell_map_kernel(const int64_t* __restrict__ position, int64_t stride_b,
                                                            int64_t stride_k, int64_t B, int64_t K, int64_t cells,
                                                            int32_t* __restrict__ slot) {
  for (int64_t b = blockIdx.x; b < B; b += gridDim.x) {
    int32_t* const row = slot + b * cells;
    for (int64_t cell = threadIdx.x; cell < cells; cell += kThreads) row[cell] = kDropped;
    __syncthreads();
    for (int64_t k = threadIdx.x; k < K; k += kThreads) {
      const int64_t cell = position[b * stride_b + k * stride_k];
      if (cell >= 0 && cell < cells) atomicMax(row + cell, static_cast<int32_t>(k));
    }
  }
}

}  // namespace

void cell_map(const std::string& op, const int64_t* position, int64_t stride_b, int64_t stride_k, int64_t B, int64_t K,
              int64_t cells, int32_t* slot, Stream stream) {
  if (B == 0) return;
  cell_map_kernel<<<blocks_for(B, 1), kThreads, 0, stream>>>(position, stride_b, stride_k, B, K, cells, slot);
  check_launch(op);
}

}  // namespace evad
