// Positions and indices come from the user: kernels on the CPU check them before they follow them.
#pragma once

#include <cstdint>

namespace evad {

// Whether all of values[0:B, 0:K] (strides in elements) are in [0, limit), and the first that is not.
struct RangeCheck {
  bool valid;
  int64_t offending;
};

inline RangeCheck check_range(const int64_t* values, int64_t stride_b, int64_t stride_k, int64_t B, int64_t K,
                              int64_t limit) {
  for (int64_t b = 0; b < B; ++b)
    for (int64_t k = 0; k < K; ++k) {
      const int64_t value = values[b * stride_b + k * stride_k];
      if (value < 0 || value >= limit) return {false, value};
    }
  return {true, 0};
}

}  // namespace evad
