// Positions and indices come from the user: kernels on the CPU check them before they follow them.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace evad {

// Throws std::invalid_argument unless all of values[0:B, 0:K] (strides in elements) are in [0, limit). `argument`
// begins the message: "scatter_tokens: position".
inline void require_in_range(const std::string& argument, const int64_t* values, int64_t stride_b, int64_t stride_k,
                             int64_t B, int64_t K, int64_t limit) {
  for (int64_t b = 0; b < B; ++b) {
    const int64_t* const row = values + b * stride_b;
    bool outside = false;  // first without branches: nearly every call is right
    for (int64_t k = 0; k < K; ++k) outside |= static_cast<uint64_t>(row[k * stride_k]) >= static_cast<uint64_t>(limit);
    for (int64_t k = 0; outside && k < K; ++k)
      if (const int64_t value = row[k * stride_k]; value < 0 || value >= limit)
        throw std::invalid_argument(argument + " must be in [0, " + std::to_string(limit) + "), got " +
                                    std::to_string(value));
  }
}

}  // namespace evad
