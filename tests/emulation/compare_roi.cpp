// roi_pool_3d's CUDA kernels, emulated (cuda_runtime.h), against the CPU kernels. Prints what differs; exit status 1.
// The forward sums rows before columns, the CPU what is less work: where all sums are exact (small integers, weights of
// few bits) the results are the same bits, ties and bins included; elsewhere the rule of accuracy holds against the
// CPU kernel in double. The backward adds in the CPU's order: the same bits, given the same bins.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cuda_runtime.h"
#include "roi_align_3d.h"

using namespace evad;

namespace {

constexpr int kThreads = 1;
const Stream kStream = nullptr;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN(), kInfinity = std::numeric_limits<double>::infinity();
std::mt19937 generator(0);
int failures = 0;

int64_t draw(int64_t limit) { return static_cast<int64_t>(generator() % limit); }

struct Case {
  const char* name;
  int64_t B, K, C, T, Gh, Gw, n;
  RoiSampling sampling;
  bool tubes = false, by_row = false;  // a box of every frame; rows with an image each, in any order
};

void fail(const Case& test, const char* what) {
  std::printf("%s: %s\n", test.name, what);
  ++failures;
}

template <class T>
bool same(const T& a, const T& b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0 || (to_float(a) != to_float(a) && to_float(b) != to_float(b));
}
template <class T>
bool all_same(const std::vector<T>& a, const std::vector<T>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), same<T>);
}

// Largest difference where `truth` is finite; infinite if NaN or infinity stand elsewhere.
template <class T>
double error(const std::vector<T>& values, const std::vector<double>& truth) {
  double most = 0;
  for (size_t i = 0; i < truth.size(); ++i) {
    const double value = to_float(values[i]);
    if (std::isfinite(truth[i]))
      most = std::max(most, std::isfinite(value) ? std::abs(value - truth[i]) : kInfinity);
    else if (!(value == truth[i]) && !(value != value && truth[i] != truth[i]))
      return kInfinity;
  }
  return most;
}

template <class T, class U>
std::vector<T> converted(const std::vector<U>& values) {
  std::vector<T> result;
  for (const U& value : values) result.push_back(from_float<T>(static_cast<accumulate_t<T>>(to_float(value))));
  return result;
}

struct Pooled {
  std::vector<double> value;
  std::vector<uint8_t> largest;
};

// Inputs of a case. Features are of type T; `exact` ones are small integers, and boxes begin on quarters of cells.
template <class T>
struct Inputs {
  using F = accumulate_t<T>;
  Case test;
  std::vector<T> tokens, background, grad;
  std::vector<F> wide_tokens, wide_background;
  std::vector<double> wider_tokens, wider_background;
  std::vector<int64_t> position, batch, order, begin;
  std::vector<int32_t> slot;
  std::vector<float> corners;
  int64_t cells = 0, R = 0;

  Inputs(const Case& test, bool exact, bool special) : test(test) {
    cells = test.T * test.Gh * test.Gw, R = test.B * test.n;
    const auto feature = [&] {
      if (special && draw(40) == 0) return draw(3) == 0 ? kNaN : draw(2) == 0 ? kInfinity : -kInfinity;
      return exact ? static_cast<double>(draw(17) - 8) : std::normal_distribution<double>()(generator);
    };
    std::vector<double> values(test.B * test.K * test.C);
    std::generate(values.begin(), values.end(), feature);
    tokens = converted<T>(values);
    values.resize(cells * test.C);
    std::generate(values.begin(), values.end(), feature);
    background = converted<T>(values);
    values.resize(R * test.C);
    std::generate(values.begin(), values.end(), [] { return std::normal_distribution<double>()(generator); });
    grad = converted<T>(values);
    wide_tokens = converted<F>(tokens), wide_background = converted<F>(background);
    wider_tokens = converted<double>(tokens), wider_background = converted<double>(background);
    for (int64_t i = 0; i < test.B * test.K; ++i) position.push_back(draw(cells));
    slot.resize(test.B * cells);
    cell_map("cell_map", position.data(), test.K, 1, test.B, test.K, cells, slot.data(), kThreads);
    const int64_t sides[] = {test.Gw, test.Gh}, bins[] = {test.sampling.ow, test.sampling.oh};
    for (int64_t i = 0; i < R * (test.tubes ? test.T : 1); ++i) {
      float box[4];
      for (const int axis : {0, 1}) {
        const int64_t quarters = draw(4 * sides[axis] + 8) - 4;  // half a cell more than a quarter: alignment takes it
        const auto anywhere = [&](double first) {
          return std::uniform_real_distribution<double>(first, sides[axis])(generator);
        };
        const double low = exact ? quarters / 4.0 + 0.5 : anywhere(-2);
        const double length = exact ? bins[axis] * (1 + draw(4)) / 2.0 : anywhere(0);
        box[axis] = static_cast<float>(16 * low), box[2 + axis] = static_cast<float>(16 * (low + length));
      }
      corners.insert(corners.end(), box, box + 4);
    }
    if (!exact) {
      const float nan = NAN, huge = 3.4e38f;
      const float hostile[][4] = {{nan, 0, 40, 40}, {40, 0, 0, 40},         {-INFINITY, -INFINITY, INFINITY, INFINITY},
                                  {0, 0, INFINITY, 20}, {-1e30f, -1e30f, 1e30f, 1e30f}, {huge, huge, huge, huge},
                                  {50, 17.25f, 50, 17.25f}, {-16, -16, 0, 0},   {1e-30f, -0.0f, 30, 200}};
      for (size_t i = 0; i < std::size(hostile) && 8 * i < corners.size(); ++i)
        std::copy(hostile[i], hostile[i] + 4, corners.begin() + 8 * i);
    }
    if (!test.by_row) return;
    for (int64_t r = 0; r < R; ++r) batch.push_back(draw(test.B));
    begin.push_back(0);
    for (int64_t b = 0; b < test.B; ++b) {
      for (int64_t r = 0; r < R; ++r)
        if (batch[r] == b) order.push_back(r);
      begin.push_back(static_cast<int64_t>(order.size()));
    }
  }

  template <class E>
  TokenGrid<E> grid(const std::vector<E>& features, const std::vector<E>& blank, int background_ndim) const {
    return {features.data(), test.K * test.C, test.C, slot.data(), background_ndim ? blank.data() : nullptr,
            background_ndim == 2, test.B, test.K, test.C, test.T, test.Gh, test.Gw};
  }
  RoiBoxes boxes() const {
    return {corners.data(), false, batch.empty() ? nullptr : batch.data(), R, test.tubes ? test.T : 1};
  }
  RoiRows rows() const { return {order.empty() ? nullptr : order.data(), begin.empty() ? nullptr : begin.data()}; }
  RoiPixels pixels() const { return {test.sampling, 1.0 / 16}; }
};

template <class T>
std::vector<char> work(const Inputs<T>& in, int background_ndim, bool backward) {
  const auto grid = in.grid(in.tokens, in.background, background_ndim);
  const int64_t bytes = roi_pool_3d_work<T>(grid, in.boxes(), in.test.sampling, backward && background_ndim);
  return std::vector<char>(bytes, '\xff');
}

template <class T>
void compare_forward(const Inputs<T>& in, int background_ndim, bool exact) {
  using F = accumulate_t<T>;
  const Case& test = in.test;
  const int64_t bins = test.sampling.oh * test.sampling.ow, R = in.R, C = test.C;
  const bool bytes = bins <= 256;
  const size_t size = R * test.T * C * (bytes ? 1 : 4);
  std::vector<T> pooled(R * C), inference(R * C), cpu(R * C);
  std::vector<char> largest(size, 77), cpu_largest(size, 77);
  auto memory = work(in, background_ndim, false);
  const auto grid = in.grid(in.tokens, in.background, background_ndim);
  roi_pool_3d_forward<T>(grid, in.boxes(), in.rows(), in.pixels(), pooled.data(), largest.data(), memory.data(),
                         kStream);
  roi_pool_3d_forward<T>(grid, in.boxes(), in.rows(), in.pixels(), inference.data(), nullptr, memory.data(), kStream);
  if (!all_same(pooled, inference)) fail(test, "inference gives other bits than training");
  const auto wide = in.grid(in.wide_tokens, in.wide_background, background_ndim);
  roi_pool_3d_forward<T>(wide, in.boxes(), in.pixels(), cpu.data(), cpu_largest.data(), kThreads);
  if (exact) {
    if (!all_same(pooled, cpu)) fail(test, "pooled differs");
    if (largest != cpu_largest) fail(test, "largest differs");
    return;
  }
  const auto wider = in.grid(in.wider_tokens, in.wider_background, background_ndim);
  std::vector<double> truth(R * C), samples(R * C * test.T * bins);
  roi_pool_3d_forward<double>(wider, in.boxes(), in.pixels(), truth.data(), nullptr, kThreads);
  roi_align_3d_forward<double>(wider, in.boxes(), in.pixels(), samples.data(), kThreads);
  double scale = 0;
  for (const double x : samples)
    if (std::isfinite(x)) scale = std::max(scale, std::abs(x));
  const double roundings = sizeof(F) == 8 ? 1e-12 : 4 * std::numeric_limits<float>::epsilon();
  if (!(error(pooled, truth) <= 2 * error(cpu, truth) + roundings * scale)) fail(test, "pooled is inaccurate");
  for (int64_t r = 0; r < R; ++r)
    for (int64_t t = 0; t < test.T; ++t)
      for (int64_t c = 0; c < C; ++c) {
        const int64_t at = (r * test.T + t) * C + c;
        const int64_t bin = bytes ? reinterpret_cast<const uint8_t*>(largest.data())[at]
                                  : reinterpret_cast<const int32_t*>(largest.data())[at];
        const double* const of = samples.data() + ((r * C + c) * test.T + t) * bins;
        double most = of[0];
        for (int64_t i = 1; i < bins; ++i) most = is_larger(of[i], most) ? of[i] : most;
        if (bin < 0 || bin >= bins) return fail(test, "largest is no bin");
        const bool both_nan = of[bin] != of[bin] && most != most;
        if (!both_nan && of[bin] != most && !(of[bin] >= most - roundings * scale))
          return fail(test, "largest is another bin");
      }
}

template <class T>
void compare_backward(const Inputs<T>& in, int background_ndim) {
  using F = accumulate_t<T>;
  const Case& test = in.test;
  const int64_t bins = test.sampling.oh * test.sampling.ow;
  std::vector<char> largest(in.R * test.T * test.C * (bins <= 256 ? 1 : 4));
  for (int64_t i = 0; i < in.R * test.T * test.C; ++i)
    if (bins <= 256)
      reinterpret_cast<uint8_t*>(largest.data())[i] = static_cast<uint8_t>(draw(bins));
    else
      reinterpret_cast<int32_t*>(largest.data())[i] = static_cast<int32_t>(draw(bins));
  const std::vector<T> zeros = converted<T>(std::vector<double>(test.B * test.K * test.C));
  std::vector<T> tokens = zeros, cpu_tokens = zeros;
  std::vector<T> blank(background_ndim == 2 ? in.cells * test.C : background_ndim * test.C), cpu_blank = blank;
  auto memory = work(in, background_ndim, true);
  const auto grid = in.grid(in.tokens, in.background, background_ndim);
  roi_pool_3d_backward<T>(grid, in.boxes(), in.rows(), in.pixels(), in.grad.data(), largest.data(), tokens.data(),
                          background_ndim ? blank.data() : nullptr, memory.data(), kStream);
  const auto wide = in.grid(in.wide_tokens, in.wide_background, background_ndim);
  roi_3d_backward<T>(wide, in.boxes(), in.pixels(), in.grad.data(), largest.data(), cpu_tokens.data(),
                     background_ndim ? cpu_blank.data() : nullptr, kThreads);
  if (!all_same(tokens, cpu_tokens)) fail(test, "grad_tokens differs");
  // Images are added one after the other on the CPU, maybe in groups here; a sum in double may end on a tie.
  const std::vector<double> want = converted<double>(cpu_blank);
  double scale = 0;
  for (const double x : want) scale = std::max(scale, std::abs(x));
  const double unit = sizeof(T) == 8 ? 1e-14 : sizeof(T) == 4 ? 2e-7 : sizeof(F) == 4 && scale > 0 ? 0.01 : 0;
  const bool in_order = background_ndim == 2 && emulated_limits.multiprocessors > 1;
  const bool right = in_order ? all_same(blank, cpu_blank) : error(blank, want) <= unit * scale;
  if (!right) fail(test, "grad_background differs");
}

template <class T>
void compare(const Case& test) {
  // How many frames are on chip at a time, or none.
  for (const int frames : {4, 2, 1, 0}) {
    if (sizeof(T) == 8 && frames > 1) continue;
    const int64_t panel = sizeof(T) < 4 ? 64 : 32, sums = 32 * panel * sizeof(accumulate_t<T>);
    emulated_limits.shared = static_cast<int>(sums + frames * test.Gh * test.Gw * panel * sizeof(T));
    for (const bool exact : {true, false}) {
      const Inputs<T> in(test, exact, false), special(test, exact, true);
      compare_forward(in, frames % 3, exact);
      compare_forward(special, 2, exact);
    }
  }
  // One multiprocessor has few owners: they take several images each.
  for (const int multiprocessors : {1, 100}) {
    emulated_limits.multiprocessors = multiprocessors;
    const Inputs<T> in(test, false, false);
    for (const int background_ndim : {0, 1, 2}) compare_backward(in, background_ndim);
  }
  emulated_limits.multiprocessors = 1;
}

constexpr RoiSampling usual{8, 4, 2, true};

template <class T>
void compare_most() {
  compare<T>({"odd", 2, 37, 5, 4, 5, 7, 9, usual});
  compare<T>({"one cell", 1, 1, 1, 1, 1, 1, 3, usual});
  compare<T>({"tubes", 2, 40, 8, 4, 5, 6, 5, usual, true});
  compare<T>({"in any order", 3, 30, 3, 2, 6, 4, 7, {4, 4, 4, true}, false, true});
  compare<T>({"many samples", 1, 50, 8, 4, 9, 8, 5, {2, 1, 8, true}});
  compare<T>({"many bins", 1, 20, 3, 1, 4, 5, 3, {16, 32, 2, true}});  // taps are not made on chip
}

}  // namespace

int main() {
  compare_most<float>();
  compare_most<bfloat16>();
  compare_most<double>();
  const Case panels{"two panels", 2, 20, 72, 3, 4, 3, 3, usual};
  compare<float>(panels);
  compare<bfloat16>(panels);
  compare<float16>(panels);
  // More cells than one owner of the backward has.
  Case test{"wide", 1, 500, 2, 1, 20, 40, 4, {7, 7, 2, true}};
  compare_backward(Inputs<float>(test, false, false), 2);
  compare_backward(Inputs<double>(test, false, false), 1);
  return failures != 0;
}
