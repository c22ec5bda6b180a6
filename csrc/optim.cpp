// adamw: every parameter, gradient and moment is read once, and all but the gradient written once
// (28 bytes an element in float32).  All tensors are cut into chunks that the threads share.
// grad_norm: every gradient is read once; sums of chunks are added in order.

#include <algorithm>
#include <cmath>

#include "optim_state.h"
#include "philox.h"

namespace llmkern {
namespace {

constexpr int64_t kChunk = 16384;  // elements a task; a multiple of what random numbers come in

struct Factors {
  float keep, beta1, beta2, grad, grad1, grad2, rate, root, eps;
};

// Moves `value` up or down to a bfloat16, at random with the right mean.
Vec round_at_random(Vec value, const uint32_t* numbers) {
  IntVec noise;
  std::memcpy(&noise, numbers, sizeof noise);
  const IntVec finite = (bits(value) & 0x7f800000) != 0x7f800000;
  return floats((bits(value) + ((noise >> 16) & 0xffff & finite)) & static_cast<int32_t>(0xffff0000));
}

// A parameter with its states, which may begin at element `begin`; `largest` and `master` may be null.
template <class T, class S>
struct Parameter {
  T* value;
  const T* grad;
  S *first, *second, *largest;
  float* master;
  int64_t begin = 0;

  // Elements at .. at + n - 1; `row` is the parameter's row of the random numbers.
  void update(int64_t at, int64_t n, const Factors& f, const Random& random, int64_t row) const {
    uint32_t numbers[Random::kGroup];
    for (int64_t i = at; i < at + n; i += W) {
      const int k = static_cast<int>(std::min<int64_t>(W, at + n - i));
      const Vec g = load(grad + i, k) * f.grad;
      const Vec m = fma(load(first + i - begin, k), set(f.beta1), g * f.grad1);
      Vec v = fma(load(second + i - begin, k), set(f.beta2), g * g * f.grad2);
      store(first + i - begin, m, k);
      store(second + i - begin, v, k);
      if (largest) {
        const Vec before = load(largest + i, k);
        v = before > v ? before : v;  // NaN stays
        store(largest + i, v, k);
      }
      const Vec step = m * f.rate / (sqrt(v) * f.root + f.eps);
      Vec x = fma(master ? load(master + i, k) : load(value + i, k), set(f.keep), -step);
      if (master) store(master + i, x, k);
      if (random) {
        if (i % Random::kGroup == 0) random.numbers(row, i, numbers);
        x = round_at_random(x, numbers + i % Random::kGroup);
      }
      store(value + i, x, k);
    }
  }
};

// The same with states in 8 bits; `at` begins a block of them.
template <class T>
struct CodedParameter {
  T* value;
  const T* grad;
  uint8_t *first, *second;
  float *first_scales, *second_scales, *master;

  void update(int64_t at, int64_t n, const Factors& f, const Random& random, int64_t row) const {
    alignas(64) float m[kStateBlock], v[kStateBlock];
    for (const int64_t end = at + n; at < end; at += kStateBlock) {
      const int64_t block = at / kStateBlock, count = std::min(kStateBlock, end - at);
      StateCodes<true>::decode(first + at, first_scales[block], count, m);
      StateCodes<false>::decode(second + at, second_scales[block], count, v);
      Parameter<T, float>{value, grad, m, v, nullptr, master, at}.update(at, count, f, random, row);
      first_scales[block] = StateCodes<true>::encode(m, count, first + at);
      second_scales[block] = StateCodes<false>::encode(v, count, second + at);
    }
  }
};

// (tensor, first element) of every chunk
std::vector<std::pair<size_t, int64_t>> chunks_of(const std::vector<Tensor>& tensors) {
  std::vector<std::pair<size_t, int64_t>> chunks;
  for (size_t t = 0; t < tensors.size(); ++t)
    for (int64_t at = 0; at < tensors[t].count(); at += kChunk) chunks.emplace_back(t, at);
  return chunks;
}

}  // namespace

void adamw_fwd(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
               std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> max_exp_avg_sqs,
               std::vector<Tensor> masters, std::vector<Tensor> exp_avg_scales,
               std::vector<Tensor> exp_avg_sq_scales, Tensor grad_scale, Tensor seed, int64_t step, double lr,
               double beta1, double beta2, double weight_decay, double eps, bool maximize) {
  Factors f;
  f.keep = static_cast<float>(1 - lr * weight_decay);
  f.grad = (maximize ? -1.0f : 1.0f) * (grad_scale ? *grad_scale.as<float>() : 1.0f);
  f.beta1 = static_cast<float>(beta1), f.grad1 = static_cast<float>(1 - beta1);
  f.beta2 = static_cast<float>(beta2), f.grad2 = static_cast<float>(1 - beta2);
  f.rate = static_cast<float>(lr / (1 - std::pow(beta1, step)));
  f.root = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, step)));
  f.eps = static_cast<float>(eps);
  const Random random(seed);
  const auto chunks = chunks_of(params);
  parallel_for(static_cast<int64_t>(chunks.size()), false, [&](int64_t c) {
    const size_t i = chunks[c].first;
    const int64_t at = chunks[c].second, n = std::min(kChunk, params[i].count() - at);
    with_type(params[i].dtype, [&](auto type) {
      using T = decltype(type);
      float* master = masters.empty() ? nullptr : masters[i].as<float>();
      const auto update = [&](auto state) {
        using S = decltype(state);
        Parameter<T, S>{params[i].as<T>(),
                        grads[i].as<T>(),
                        exp_avgs[i].as<S>(),
                        exp_avg_sqs[i].as<S>(),
                        max_exp_avg_sqs.empty() ? nullptr : max_exp_avg_sqs[i].as<S>(),
                        master}
            .update(at, n, f, random, static_cast<int64_t>(i));
      };
      if (exp_avgs[i].dtype == DType::u8)
        CodedParameter<T>{params[i].as<T>(),           grads[i].as<T>(),
                          exp_avgs[i].as<uint8_t>(),   exp_avg_sqs[i].as<uint8_t>(),
                          exp_avg_scales[i].as<float>(), exp_avg_sq_scales[i].as<float>(), master}
            .update(at, n, f, random, static_cast<int64_t>(i));
      else if (exp_avgs[i].dtype == DType::f32)
        update(0.0f);
      else
        update(T{});
    });
  });
}

void grad_norm_fwd(std::vector<Tensor> grads, Tensor norm) {
  const auto chunks = chunks_of(grads);
  std::vector<double> sums(chunks.size());
  parallel_for(static_cast<int64_t>(chunks.size()), false, [&](int64_t c) {
    const Tensor& g = grads[chunks[c].first];
    const int64_t at = chunks[c].second, n = std::min(kChunk, g.count() - at);
    with_type(g.dtype, [&](auto type) {
      const auto* from = g.as<decltype(type)>() + at;
      Vec total[4] = {};
      for (int64_t i = 0; i < n; i += W) {
        const Vec x = load(from + i, static_cast<int>(std::min<int64_t>(W, n - i)));
        total[i / W % 4] = fma(x, x, total[i / W % 4]);
      }
      sums[c] = sum((total[0] + total[1]) + (total[2] + total[3]));
    });
  });
  double total = 0;
  for (const double s : sums) total += s;
  *norm.as<float>() = static_cast<float>(std::sqrt(total));
}

KERNEL(adamw_fwd);
KERNEL(grad_norm_fwd);

}  // namespace llmkern
