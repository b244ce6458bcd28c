// copy_rows on a GPU. In parallel: rows, then 16-byte vectors of a row (narrower where addresses are not aligned).
// Reads row_bytes and writes row_bytes a row, coalesced; nothing is written twice.
#pragma once

#include "cuda_launch.cuh"

namespace evad {

template <class Vector, class Source>
__global__ void __launch_bounds__(256) copy_rows_kernel(Source source, int64_t B, int64_t rows, int64_t vectors,
                                                        Vector* __restrict__ out) {
  for (int64_t b = blockIdx.y; b < B; b += gridDim.y)
    for (int64_t row = blockIdx.x * static_cast<int64_t>(blockDim.y) + threadIdx.y; row < rows;
         row += gridDim.x * static_cast<int64_t>(blockDim.y)) {
      const Vector* const in = reinterpret_cast<const Vector*>(source(b, row));
      Vector* const to = out + (b * rows + row) * vectors;
      for (int64_t v = threadIdx.x; v < vectors; v += blockDim.x) to[v] = in ? __ldg(in + v) : Vector{};
    }
}

template <class... Pointers>
inline uint64_t address_bits(const Pointers*... pointers) {
  return (uint64_t{0} | ... | reinterpret_cast<uint64_t>(pointers));
}

// The widest vector, at most 16 bytes, to which all addresses, strides and sizes that are or-ed in `bits` are aligned.
inline int vector_bytes(uint64_t bits) {
  bits |= 16;
  return static_cast<int>(bits & (~bits + 1));
}

// `alignment`: every address and byte stride that the source reads through, or-ed.
template <class Source>
void copy_rows(const char* op, const Source& source, uint64_t alignment, int64_t B, int64_t rows, int64_t row_bytes,
               char* out, Stream stream) {
  if (B == 0 || rows == 0 || row_bytes == 0) return;
  const int bytes = vector_bytes(alignment | reinterpret_cast<uint64_t>(out) | static_cast<uint64_t>(row_bytes));
  const int64_t vectors = row_bytes / bytes;
  const auto launch = [&](auto zero) {
    using Vector = decltype(zero);
    int lanes = 1;  // threads to a row
    while (lanes < 32 && lanes < vectors) lanes *= 2;
    const dim3 block(lanes, 256 / lanes);
    const dim3 grid(blocks_for(rows, block.y), std::min(B, kMaxBlocksY));
    copy_rows_kernel<Vector><<<grid, block, 0, stream>>>(source, B, rows, vectors, reinterpret_cast<Vector*>(out));
    check_launch(op);
  };
  switch (bytes) {
    case 16: return launch(uint4{});
    case 8: return launch(uint2{});
    case 4: return launch(uint32_t{});
    case 2: return launch(uint16_t{});
    default: return launch(uint8_t{});
  }
}

}  // namespace evad
