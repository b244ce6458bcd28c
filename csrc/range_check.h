// Positions and indices come from the user: kernels on the CPU check them before they follow them.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace evad {

// Throws std::invalid_argument unless all of values[0:B, 0:K] (strides in elements) are in [0, limit). `argument` begins the
// message: "scatter_tokens: position".
inline void require_in_range(const std::string& argument, const int64_t* values, int64_t stride_b, int64_t stride_k,
                             int64_t B, int64_t K, int64_t limit) {
  for (int64_t b = 0; b < B; ++b)
    for (int64_t k = 0; k < K; ++k) {
      const int64_t value = values[b * stride_b + k * stride_k];
      if (value < 0 || value >= limit)
        throw std::invalid_argument(argument + " must be in [0, " + std::to_string(limit) + "), got " +
                                    std::to_string(value));
    }
}

}  // namespace evad
