// What every CUDA launch shares: its size, and an error that Python can raise.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "host_device.h"

namespace evad {

constexpr int64_t kMaxBlocks = 2147483647;  // of gridDim.x; kernels stride over what is beyond
constexpr int64_t kMaxBlocksY = 65535;

inline int64_t blocks_for(int64_t items, int64_t items_per_block) {
  return std::min((items + items_per_block - 1) / items_per_block, kMaxBlocks);
}

// After each launch. Asks for errors of calls only, never waits: a launch may be part of a graph capture.
inline void check_launch(const std::string& op) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(op + ": CUDA launch failed: " + cudaGetErrorString(error));
}

// Of the current device, in bytes where it is memory.
struct DeviceLimits {
  int multiprocessors, shared_of_block, shared_of_multiprocessor;
};

inline DeviceLimits device_limits(const std::string& op) {
  int device = 0;
  DeviceLimits limits{};
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&limits.shared_of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&limits.shared_of_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  check_launch(op);
  return limits;
}

// Lets a kernel have all the dynamic shared memory of a block; always the same, so threads may race to say it.
template <class Kernel>
void allow_shared(Kernel* kernel, const DeviceLimits& limits) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_of_block);
}

}  // namespace evad
