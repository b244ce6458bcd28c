// The inverse of `position`: which kept token, if any, a cell of the dense grid holds.
#pragma once

#include <cstdint>
#include <string>

#include "host_device.h"

namespace evad {

constexpr int32_t kDropped = -1;

// slot[b, cell] = the token at `cell`, or kDropped. Where two tokens name one cell the later token has it.
// A position outside [0, cells) throws std::invalid_argument on the CPU, before anything is written; on a GPU
// it is left out.
//   position [B, K] int64, strides in elements    slot [B, cells] int32, contiguous
void cell_map(const std::string& op, const int64_t* position, int64_t stride_b, int64_t stride_k, int64_t B, int64_t K,
              int64_t cells, int32_t* slot, int threads);
void cell_map(const std::string& op, const int64_t* position, int64_t stride_b, int64_t stride_k, int64_t B, int64_t K,
              int64_t cells, int32_t* slot, Stream stream);

}  // namespace evad
