// The CUDA kernels, emulated (cuda_runtime.h), against the CPU kernels: the same bits. Prints what differs; exit status 1.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "scatter_tokens.h"
#include "token_selection.h"

using namespace evad;

namespace {

constexpr int kThreads = 1;
const Stream kStream = nullptr;
std::mt19937 generator(0);
int failures = 0;

template <class T>
void expect_same(const char* what, const std::vector<T>& emulated, const std::vector<T>& cpu) {
  if (emulated == cpu) return;
  std::printf("%s differs\n", what);
  ++failures;
}

int64_t draw(int64_t limit) { return static_cast<int64_t>(generator() % limit); }

template <class T>
const char* bytes(const std::vector<T>& values) {
  return reinterpret_cast<const char*>(values.data());
}
template <class T>
char* bytes(std::vector<T>& values) {
  return reinterpret_cast<char*>(values.data());
}

template <class T>
void compare_selection(int64_t B, int64_t M, int64_t num_select) {
  const std::array<T, 9> special{NAN, -NAN, INFINITY, -INFINITY, 0, T(-0.0), 1, -1, std::numeric_limits<T>::denorm_min()};
  for (int kind = 0; kind < 3; ++kind) {
    std::vector<T> importance(B * M);
    for (T& value : importance)
      value = kind == 0   ? std::exp(std::normal_distribution<T>(0, T(0.3))(generator))
              : kind == 1 ? static_cast<T>(draw(4))
                          : special[draw(special.size())];
    std::vector<int64_t> emulated(B * num_select, -1), cpu = emulated, alone = emulated;
    std::vector<int32_t> slot_emulated(B * M, -2), slot_cpu = slot_emulated;
    select_tokens<T>(importance.data(), M, 1, B, M, num_select, emulated.data(), slot_emulated.data(), kStream);
    select_tokens<T>(importance.data(), M, 1, B, M, num_select, alone.data(), nullptr, kStream);
    select_tokens<T>(importance.data(), M, 1, B, M, num_select, cpu.data(), slot_cpu.data(), kThreads);
    expect_same("select_tokens", emulated, cpu);
    expect_same("select_tokens, no inverse map", alone, cpu);
    expect_same("select_tokens: slot", slot_emulated, slot_cpu);
  }
}

void compare_copies(int64_t C, bool repeated) {
  constexpr int64_t B = 2, N = 50, num_keyframe = 7, M = N - num_keyframe, K = 30, cells = 70;
  const int64_t row_bytes = C * sizeof(float);
  std::vector<float> tokens(B * N * C), fill(cells * C);
  for (float& value : tokens) value = static_cast<float>(draw(1000));
  for (float& value : fill) value = static_cast<float>(draw(1000));
  std::vector<int64_t> index(B * K), position(B * K);
  for (int64_t i = 0; i < B * K; ++i) {
    index[i] = repeated ? draw(M) : i % K * 13 % M;
    position[i] = repeated ? draw(cells) : i % K * 17 % cells;
  }

  std::vector<float> emulated(B * (num_keyframe + K) * C, -1), cpu = emulated;
  const GatherRows rows{bytes(tokens), N * row_bytes, row_bytes, index.data(), K, 1, N, num_keyframe};
  gather_tokens_forward(rows, B, K, row_bytes, bytes(emulated), kStream);
  gather_tokens_forward(rows, B, K, row_bytes, bytes(cpu), kThreads);
  expect_same("gather_tokens", emulated, cpu);

  std::vector<float> grad_emulated(B * N * C, -1), grad_cpu = grad_emulated;
  std::vector<int32_t> copies(2 * B * M);
  const GatherGradRows grad_rows{bytes(cpu), index.data(), K, 1, copies.data(), B, N, num_keyframe, K, row_bytes};
  gather_tokens_backward(grad_rows, copies.data(), grad_emulated.data(), kStream);
  gather_tokens_backward(grad_rows, copies.data(), grad_cpu.data(), kThreads);
  expect_same("gather_tokens: grad_tokens", grad_emulated, grad_cpu);

  std::vector<int32_t> slot_emulated(B * cells), slot = slot_emulated;
  cell_map("cell_map", position.data(), K, 1, B, K, cells, slot_emulated.data(), kStream);
  cell_map("cell_map", position.data(), K, 1, B, K, cells, slot.data(), kThreads);
  expect_same("cell_map", slot_emulated, slot);

  for (const int fill_ndim : {0, 1, 2}) {
    std::vector<float> dense_emulated(B * cells * C, -1), dense = dense_emulated;
    const ScatterRows scatter{bytes(tokens),  N * row_bytes, row_bytes, slot.data(), fill_ndim ? bytes(fill) : nullptr,
                              fill_ndim == 2, cells,         row_bytes};
    scatter_tokens_forward(scatter, B, bytes(dense_emulated), kStream);
    scatter_tokens_forward(scatter, B, bytes(dense), kThreads);
    expect_same("scatter_tokens", dense_emulated, dense);

    std::vector<float> tokens_emulated(B * K * C, -1), tokens_cpu = tokens_emulated;
    const ScatterGradRows scatter_grad{bytes(dense), position.data(), K, 1, slot.data(), cells, row_bytes};
    scatter_tokens_backward(scatter_grad, B, K, bytes(tokens_emulated), kStream);
    scatter_tokens_backward(scatter_grad, B, K, bytes(tokens_cpu), kThreads);
    expect_same("scatter_tokens: grad_tokens", tokens_emulated, tokens_cpu);

    if (fill_ndim == 0) continue;
    const bool per_cell = fill_ndim == 2;
    std::vector<float> fill_emulated((per_cell ? cells : 1) * C, -1), fill_cpu = fill_emulated;
    std::vector<double> partial(fill_runs(B, cells) * C);
    scatter_tokens_backward_fill(dense.data(), slot.data(), per_cell, B, cells, C, fill_emulated.data(), partial.data(),
                                 kStream);
    scatter_tokens_backward_fill(dense.data(), slot.data(), per_cell, B, cells, C, fill_cpu.data(), partial.data(),
                                 kThreads);
    expect_same("scatter_tokens: grad_fill", fill_emulated, fill_cpu);
  }

  // What is outside: zeros of gather_tokens, no cell of scatter_tokens, and nothing beyond the ends.
  index[3] = -5;
  index[4] = M;
  position[3] = -1;
  position[4] = cells;
  gather_tokens_forward(rows, B, K, row_bytes, bytes(emulated), kStream);
  std::fill_n(cpu.begin() + (num_keyframe + 3) * C, 2 * C, 0.0f);
  expect_same("gather_tokens, index outside", emulated, cpu);
  cell_map("cell_map", position.data(), K, 1, B, K, cells, slot_emulated.data(), kStream);
  const auto sample = slot_emulated.begin();
  if (std::count(sample, sample + cells, 3) + std::count(sample, sample + cells, 4) != 0) {
    std::printf("cell_map kept a position outside\n");
    ++failures;
  }
  gather_tokens_backward(grad_rows, copies.data(), grad_emulated.data(), kStream);
}

}  // namespace

int main() {
  compare_selection<float>(2, 63, 20);
  compare_selection<float>(1, 1372, 902);
  compare_selection<double>(1, 600, 600);
  compare_selection<float>(2, 700, 0);
  compare_selection<float>(1, 9000, 4500);  // more keys than registers hold
  for (const int64_t C : {3, 8, 20})  // vectors of 4 and 16 bytes
    for (const bool repeated : {false, true}) compare_copies(C, repeated);
  return failures != 0;
}
