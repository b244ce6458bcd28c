#include "cell_map.h"

#include "parallel.h"

namespace evad {
namespace {

constexpr int64_t kCellsPerThread = 16384;  // some 5 us, what waking a thread costs

}  // namespace

RangeCheck cell_map(const int64_t* position, int64_t stride_b, int64_t stride_k, int64_t B, int64_t K, int64_t cells,
                    int32_t* slot, int threads) {
  const RangeCheck check = check_range(position, stride_b, stride_k, B, K, cells);
  if (!check.valid) return check;
  const auto invert = [&](int64_t b) {
    int32_t* row = slot + b * cells;
    for (int64_t cell = 0; cell < cells; ++cell) row[cell] = kDropped;
    for (int64_t k = 0; k < K; ++k) row[position[b * stride_b + k * stride_k]] = static_cast<int32_t>(k);
  };
  parallel_for(B, threads, invert, kCellsPerThread / (cells + 1));
  return check;
}

}  // namespace evad
