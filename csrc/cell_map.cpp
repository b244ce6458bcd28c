// cell_map on the CPU: one task a sample. Reads 8 K bytes twice (the range, the positions), writes 4 cells + 4 K.
#include "cell_map.h"

#include "parallel.h"
#include "range_check.h"

namespace evad {
namespace {

constexpr int64_t kCellsPerThread = 16384;  // some 10 us: less is not worth waking the threads

}  // namespace

void cell_map(const std::string& op, const int64_t* position, int64_t stride_b, int64_t stride_k, int64_t B, int64_t K,
              int64_t cells, int32_t* slot, int threads) {
  require_in_range(op + ": position", position, stride_b, stride_k, B, K, cells);
  const auto invert = [&](int64_t b) {
    int32_t* row = slot + b * cells;
    for (int64_t cell = 0; cell < cells; ++cell) row[cell] = kDropped;
    for (int64_t k = 0; k < K; ++k) row[position[b * stride_b + k * stride_k]] = static_cast<int32_t>(k);
  };
  parallel_for(B, threads, invert, kCellsPerThread / (cells + 1));
}

}  // namespace evad
