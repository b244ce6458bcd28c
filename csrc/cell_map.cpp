#include "cell_map.h"

#include "parallel.h"

namespace evad {

CellMapResult cell_map(const int64_t* position, int64_t stride_b, int64_t stride_k, int64_t B, int64_t K, int64_t cells,
                       int32_t* slot, int threads) {
  for (int64_t b = 0; b < B; ++b)
    for (int64_t k = 0; k < K; ++k) {
      const int64_t cell = position[b * stride_b + k * stride_k];
      if (cell < 0 || cell >= cells) return {false, cell};
    }
  parallel_for(B, threads, [&](int64_t b) {
    int32_t* row = slot + b * cells;
    for (int64_t cell = 0; cell < cells; ++cell) row[cell] = kDropped;
    for (int64_t k = 0; k < K; ++k) row[position[b * stride_b + k * stride_k]] = static_cast<int32_t>(k);
  });
  return {true, 0};
}

}  // namespace evad
