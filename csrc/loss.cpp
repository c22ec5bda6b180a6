// cross_entropy, a row of logits z at a time:
//
//   lse  = top + log_total,   top = max z,   log_total = log Σ exp(z - top)
//   loss = (1 - ε) w[t] (lse - z[t]) + ε/C Σ w (lse - z)
//   dz   = dloss ((1 - ε) w[t] (p - 1[t]) + ε/C (p Σ w - w)),   p = exp(z - lse)
//
// Maximum and sum are found in one pass over memory: chunks that fit the first cache are read twice
// there, the running sum is rescaled between them.

#include <limits>

#include "loss.h"
#include "threads.h"

namespace llmkern {
namespace {

constexpr int64_t kChunk = 2048;  // logits: 8 KiB of float, a quarter of the first cache

struct Row {
  float top, log_total;
  float weighted;  // Σ w (z - z[t]), for label smoothing: differences, so that a common offset cancels
};

template <class T, class Weight>
Row reduce(const T* z, int64_t classes, const Weight& weight, bool smooth, float z_t) {
  float top = -std::numeric_limits<float>::infinity();
  Vec total{}, weighted{};
  for (int64_t begin = 0; begin < classes; begin += kChunk) {
    const int64_t end = std::min(classes, begin + kChunk);
    Vec m = set(top);
    for (int64_t i = begin; i < end; i += W) {
      const int k = lanes(i, end);
      m = max(m, keep_first(load(z + i, k), k, top));
    }
    const float higher = max_of(m);
    if (higher > top) {
      total *= std::exp(top - higher);
      top = higher;
    }
    for (int64_t i = begin; i < end; i += W) {
      const int k = lanes(i, end);
      const Vec v = load(z + i, k);
      total += keep_first(exp(v - top), k, 0.0f);
      if (smooth) weighted += keep_first(weight(i, k) * (v - z_t), k, 0.0f);
    }
  }
  return {top, std::log(sum(total)), smooth ? sum(weighted) : 0.0f};
}

template <class T>
void forward(const Tensor& logits, const Tensor& target, const Tensor& weight, int64_t ignore_index,
             float smoothing, const Tensor& loss, const Tensor& top, const Tensor& log_total) {
  const int64_t classes = logits.size[1];
  const ClassWeight<T> w(weight);
  const float total = w.total(classes), share = smoothing / classes;
  parallel_for(logits.size[0], false, [&](int64_t n) {
    const T* z = logits.as<T>() + n * logits.stride[0];
    const int64_t t = target.as<int64_t>()[n * target.stride[0]];
    const bool ignored = t == ignore_index;
    const float z_t = ignored ? 0.0f : to_float(z[t]);
    const Row row = reduce(z, classes, w, smoothing > 0 && !ignored, z_t);
    top.as<float>()[n] = row.top;
    log_total.as<float>()[n] = row.log_total;
    const float surprise = row.log_total + (row.top - z_t);  // lse - z[t]
    float l = ignored ? 0.0f : (1 - smoothing) * w(t) * surprise;
    if (smoothing > 0 && !ignored) l += share * (surprise * total - row.weighted);
    loss.as<float>()[n] = l;
  });
}

template <class T>
void backward(const Tensor& dloss, const Tensor& logits, const Tensor& target, const Tensor& weight,
              const Tensor& top, const Tensor& log_total, int64_t ignore_index, float smoothing,
              const Tensor& dlogits) {
  const int64_t classes = logits.size[1];
  const ClassWeight<T> w(weight);
  const float total = w.total(classes), share = smoothing / classes;
  parallel_for(logits.size[0], false, [&](int64_t n) {
    const T* z = logits.as<T>() + n * logits.stride[0];
    T* dz = dlogits.as<T>() + n * classes;
    const int64_t t = target.as<int64_t>()[n * target.stride[0]];
    if (t == ignore_index) return static_cast<void>(std::fill_n(dz, classes, T{}));
    const float m = top.as<float>()[n], l = log_total.as<float>()[n], d = dloss.as<float>()[n];
    const float hot = (1 - smoothing) * w(t);
    const float from_p = d * (hot + share * total), from_w = d * share;
    const auto gradient = [&](int64_t i, int k) {
      const Vec p = exp(load(z + i, k) - m - l) * from_p;
      return smoothing > 0 ? p - w(i, k) * from_w : p;
    };
    for (int64_t i = 0; i < classes; i += W) {
      const int k = lanes(i, classes);
      Vec g = gradient(i, k);
      if (t >= i && t < i + k) g[t - i] -= d * hot;  // before rounding to T
      store(dz + i, g, k);
    }
  });
}

}  // namespace

void cross_entropy_fwd(Tensor logits, Tensor target, Tensor weight, int64_t ignore_index,
                       double label_smoothing, Tensor loss, Tensor top, Tensor log_total) {
  check_targets("cross_entropy", target, logits.size[1], ignore_index);
  with_type(logits.dtype, [&](auto t) {
    forward<decltype(t)>(logits, target, weight, ignore_index, static_cast<float>(label_smoothing), loss,
                         top, log_total);
  });
}

void cross_entropy_bwd(Tensor dloss, Tensor logits, Tensor target, Tensor weight, Tensor top,
                       Tensor log_total, int64_t ignore_index, double label_smoothing, std::vector<bool>, Tensor dlogits) {
  if (!dlogits) return;
  with_type(logits.dtype, [&](auto t) {
    backward<decltype(t)>(dloss, logits, target, weight, top, log_total, ignore_index,
                          static_cast<float>(label_smoothing), dlogits);
  });
}

KERNEL(cross_entropy_fwd);
KERNEL(cross_entropy_bwd);

}  // namespace llmkern
