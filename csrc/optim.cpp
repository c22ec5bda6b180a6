// adamw: every parameter, gradient and moment is read once, and all but the gradient written once
// (28 bytes an element in float32).  All tensors are cut into chunks that the threads share.

#include <algorithm>
#include <cmath>

#include "simd.h"
#include "threads.h"

namespace llmkern {
namespace {

constexpr int64_t kChunk = 16384;  // elements a task

struct Factors {
  float keep, beta1, beta2, grad1, grad2, rate, root, eps;
};

template <class T>
void update(T* p, const T* g, T* m, T* v, int64_t n, const Factors& f) {
  for (int64_t i = 0; i < n; i += W) {
    const int k = static_cast<int>(std::min<int64_t>(W, n - i));
    const Vec grad = load(g + i, k);
    const Vec first = load(m + i, k) * f.beta1 + grad * f.grad1;
    const Vec second = load(v + i, k) * f.beta2 + grad * grad * f.grad2;
    const Vec step = first * f.rate / (sqrt(second) * f.root + f.eps);
    store(p + i, load(p + i, k) * f.keep - step, k);
    store(m + i, first, k);
    store(v + i, second, k);
  }
}

}  // namespace

void adamw_fwd(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
               std::vector<Tensor> exp_avg_sqs, int64_t step, double lr, double beta1, double beta2,
               double weight_decay, double eps) {
  Factors f;
  f.keep = static_cast<float>(1 - lr * weight_decay);
  f.beta1 = static_cast<float>(beta1), f.grad1 = static_cast<float>(1 - beta1);
  f.beta2 = static_cast<float>(beta2), f.grad2 = static_cast<float>(1 - beta2);
  f.rate = static_cast<float>(lr / (1 - std::pow(beta1, step)));
  f.root = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, step)));
  f.eps = static_cast<float>(eps);
  std::vector<std::pair<size_t, int64_t>> chunks;  // tensor, first element
  for (size_t t = 0; t < params.size(); ++t)
    for (int64_t at = 0; at < params[t].count(); at += kChunk) chunks.emplace_back(t, at);
  parallel_for(static_cast<int64_t>(chunks.size()), false, [&](int64_t c) {
    const auto [t, at] = chunks[c];
    const int64_t n = std::min(kChunk, params[t].count() - at), first = at;
    const size_t i = t;
    with_type(params[i].dtype, [&](auto type) {
      using T = decltype(type);
      update(params[i].as<T>() + first, grads[i].as<T>() + first, exp_avgs[i].as<T>() + first,
             exp_avg_sqs[i].as<T>() + first, n, f);
    });
  });
}

KERNEL(adamw_fwd);

}  // namespace llmkern
