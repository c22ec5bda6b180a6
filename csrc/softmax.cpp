// softmax and log_softmax of rows.  Maximum and sum are found in one pass over memory: chunks that fit
// the first cache are read twice there, the running sum is rescaled between them.
//
//   y = exp(x - top) / total,           dx = y (dy - Σ dy y)
//   y = x - top - log total,            dx = dy - exp(y) Σ dy              (log_softmax)

#include <algorithm>
#include <cmath>
#include <limits>

#include "simd.h"
#include "threads.h"

namespace llmkern {
namespace {

constexpr int64_t kChunk = 2048;      // elements: 8 KiB of float, a quarter of the first cache
constexpr int64_t kElements = 8192;  // at least, of one task

int lanes(int64_t i, int64_t end) { return static_cast<int>(std::min<int64_t>(W, end - i)); }

// Σ f(i, lanes) over [begin, end), in four sums so that additions need not wait for each other; f is 0
// behind the last lane.
template <class F>
Vec partial_sum(int64_t begin, int64_t end, const F& f) {
  Vec s[4] = {};
  int64_t i = begin;
  for (; i + 4 * W <= end; i += 4 * W)
    for (int k = 0; k < 4; ++k) s[k] += f(i + k * W, W);
  for (; i < end; i += W) s[0] += f(i, lanes(i, end));
  return (s[0] + s[1]) + (s[2] + s[3]);
}

// body(row) for all rows, short ones several to a task.
template <class Body>
void for_rows(const Tensor& x, const Body& body) {
  const int64_t rows = x.size[0], block = std::max<int64_t>(1, kElements / std::max<int64_t>(1, x.size[1]));
  parallel_for((rows + block - 1) / block, false, [&](int64_t task) {
    for (int64_t n = task * block; n < std::min(rows, (task + 1) * block); ++n) body(n);
  });
}

struct Normaliser {
  float top, total;  // max x, Σ exp(x - top); NaN of a row of -inf
};

template <class T>
Normaliser reduce(const T* x, int64_t width) {
  float top = -std::numeric_limits<float>::infinity();
  Vec total{};
  for (int64_t begin = 0; begin < width; begin += kChunk) {
    const int64_t end = std::min(width, begin + kChunk);
    Vec m = set(top);
    for (int64_t i = begin; i < end; i += W) {
      const int k = lanes(i, end);
      m = max(m, keep_first(load(x + i, k), k, top));
    }
    const float higher = max_of(m);
    if (higher > top) {
      total *= std::exp(top - higher);
      top = higher;
    }
    const bool nothing = top == -std::numeric_limits<float>::infinity() && end < width;
    if (nothing) continue;  // so far only -inf, which adds 0 unless the whole row is
    total += partial_sum(begin, end, [&](int64_t i, int k) {
      const Vec e = exp(load(x + i, k) - top);
      return k < W ? keep_first(e, k, 0.0f) : e;
    });
  }
  return {top, sum(total)};
}

template <bool log, class T>
void forward(const Tensor& x, const Tensor& y) {
  const int64_t width = x.size[1];
  for_rows(x, [&](int64_t n) {
    const T* row = x.as<T>() + n * width;
    T* out = y.as<T>() + n * width;
    const auto [top, total] = reduce(row, width);
    const float scale = 1.0f / total, log_total = std::log(total);
    for (int64_t i = 0; i < width; i += W) {
      const int k = lanes(i, width);
      const Vec away = load(row + i, k) - top;
      store(out + i, log ? away - log_total : exp(away) * scale, k);
    }
  });
}

template <bool log, class T>
void backward(const Tensor& dy, const Tensor& y, const Tensor& dx) {
  const int64_t width = y.size[1];
  for_rows(y, [&](int64_t n) {
    const T *g_row = dy.as<T>() + n * width, *y_row = y.as<T>() + n * width;
    T* out = dx.as<T>() + n * width;
    const Vec total = set(sum(partial_sum(0, width, [&](int64_t i, int k) {
      const Vec g = load(g_row + i, k);
      return log ? g : g * load(y_row + i, k);
    })));
    for (int64_t i = 0; i < width; i += W) {
      const int k = lanes(i, width);
      const Vec g = load(g_row + i, k), v = load(y_row + i, k);
      store(out + i, log ? g - exp(v) * total : v * (g - total), k);
    }
  });
}

}  // namespace

void softmax_fwd(Tensor x, Tensor y) {
  if (y) with_type(x.dtype, [&](auto t) { forward<false, decltype(t)>(x, y); });
}

void softmax_bwd(Tensor dy, Tensor y, std::vector<bool>, Tensor dx) {
  if (dx) with_type(y.dtype, [&](auto t) { backward<false, decltype(t)>(dy, y, dx); });
}

void log_softmax_fwd(Tensor x, Tensor y) {
  if (y) with_type(x.dtype, [&](auto t) { forward<true, decltype(t)>(x, y); });
}

void log_softmax_bwd(Tensor dy, Tensor y, std::vector<bool>, Tensor dx) {
  if (dx) with_type(y.dtype, [&](auto t) { backward<true, decltype(t)>(dy, y, dx); });
}

KERNEL(softmax_fwd);
KERNEL(softmax_bwd);
KERNEL(log_softmax_fwd);
KERNEL(log_softmax_bwd);

}  // namespace llmkern
