// As much of CUDA as the kernels without special hardware use, on threads of the host: one block at a time, a thread of
// the host a CUDA thread, barriers for __syncthreads and for warps. It shows what the code computes, not what it costs.
#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __restrict__
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(int64_t x = 1, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}
};
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};

// Dynamic shared memory, which begins with what nobody wrote: `extern __shared__` is rewritten to a call. The margins
// before and after it are nobody's.
constexpr int64_t kEmulatedMargin = 1 << 16;
constexpr char kEmulatedMarginByte = 1;  // of tiny numbers, which change whatever is added
inline std::vector<char> emulated_memory;
inline char* emulated_shared() { return emulated_memory.data() + kEmulatedMargin; }
inline void emulated_check_margins() {
  const auto is_untouched = [](char byte) { return byte == kEmulatedMarginByte; };
  if (std::all_of(emulated_memory.begin(), emulated_memory.begin() + kEmulatedMargin, is_untouched) &&
      std::all_of(emulated_memory.end() - kEmulatedMargin, emulated_memory.end(), is_untouched))
    return;
  std::printf("a kernel wrote beside its shared memory\n");
  std::exit(1);
}

struct EmulatedWarp {
  std::barrier<> barrier{32};
  int values[32];
};
struct EmulatedBlock {
  std::barrier<> barrier;
  std::vector<EmulatedWarp> warps;
  explicit EmulatedBlock(int threads) : barrier(threads), warps((threads + 31) / 32) {}
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;
inline thread_local EmulatedBlock* emulated_block;

// kernel<<<grid, block, shared, stream>>>(arguments) is rewritten to
// emulated_launch(grid, block, shared, [=] { kernel(arguments); }).
template <class Kernel>
void emulated_launch(dim3 grid, dim3 size, int64_t shared, const Kernel& kernel) {
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      emulated_memory.assign(shared + 2 * kEmulatedMargin, kEmulatedMarginByte);
      std::fill_n(emulated_shared(), shared, '\xff');  // NaN
      EmulatedBlock block(size.x * size.y);
      std::vector<std::thread> threads;
      for (unsigned thread = 0; thread < size.x * size.y; ++thread)
        threads.emplace_back([&, thread] {
          threadIdx = dim3(thread % size.x, thread / size.x);
          blockIdx = dim3(x, y);
          blockDim = size;
          gridDim = grid;
          emulated_block = &block;
          kernel();
        });
      for (std::thread& thread : threads) thread.join();
      emulated_check_margins();
    }
}

// combine(values of the warp's lanes, this lane)
template <class Combine>
auto emulated_exchange(int value, const Combine& combine) {
  const unsigned thread = threadIdx.x + threadIdx.y * blockDim.x;
  EmulatedWarp& warp = emulated_block->warps[thread / 32];
  warp.values[thread % 32] = value;
  warp.barrier.arrive_and_wait();
  const auto result = combine(warp.values, static_cast<int>(thread % 32));
  warp.barrier.arrive_and_wait();
  return result;
}

inline void __syncthreads() { emulated_block->barrier.arrive_and_wait(); }
inline unsigned __match_any_sync(unsigned, int value) {
  return emulated_exchange(value, [](const int* values, int lane) {
    unsigned same = 0;
    for (int other = 0; other < 32; ++other) same |= static_cast<unsigned>(values[other] == values[lane]) << other;
    return same;
  });
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  return emulated_exchange(vote, [](const int* values, int) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned>(values[lane]) << lane;
    return votes;
  });
}
inline int __shfl_up_sync(unsigned, int value, int distance) {
  return emulated_exchange(
      value, [=](const int* values, int lane) { return values[lane < distance ? lane : lane - distance]; });
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
void atomicAdd(T* address, T value) {
  __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}
template <class T, class Better>
void emulated_replace(T* address, T value, const Better& better) {
  T old = __atomic_load_n(address, __ATOMIC_SEQ_CST);
  while (better(value, old) &&
         !__atomic_compare_exchange_n(address, &old, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
}
template <class T>
void atomicMax(T* address, T value) {
  emulated_replace(address, value, [](T a, T b) { return a > b; });
}
template <class T>
void atomicMin(T* address, T value) {
  emulated_replace(address, value, [](T a, T b) { return a < b; });
}
using std::max;
using std::min;

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

struct EmulatedLimits {
  int multiprocessors, shared;
};
inline EmulatedLimits emulated_limits{1, 1 << 20};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaGetDevice(int*) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulated_limits.multiprocessors : emulated_limits.shared;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
