// layer_norm and rms_norm, with an optional residual add.  One row at a time: it stays in the first
// cache, so memory is read once and written once; statistics in float, two passes over the cached row.
//
//   y = (h - mean) * rstd * weight + bias,   h = x + residual,   rms_norm: mean = 0, bias = 0
//
// Backward, with n = (h - mean) * rstd and g = dy * weight:
//   dx = rstd * (g - avg(g) - n * avg(g * n)) + dh,   dweight = Σ_rows dy * n,   dbias = Σ_rows dy

#include <algorithm>
#include <memory>

#include "simd.h"
#include "threads.h"

namespace llmkern {
namespace {

constexpr int64_t kBlock = 32;  // rows a task; fixed, so that sums do not depend on the thread count

// A weight or bias: dtype T of x, or float.  Absent: a constant.
template <class T>
struct Param {
  const T* narrow;
  const float* wide;
  float absent;
  Param(const Tensor& t, float absent)
      : narrow(t && t.dtype != DType::f32 ? t.as<T>() : nullptr),
        wide(t && t.dtype == DType::f32 ? t.as<float>() : nullptr),
        absent(absent) {}
  Vec at(int64_t i, int n) const {
    return wide ? load(wide + i, n) : narrow ? load(narrow + i, n) : set(absent);
  }
};

int lanes(int64_t i, int64_t width) { return static_cast<int>(std::min<int64_t>(W, width - i)); }

// Σ f(i, lanes) over a row, in four sums so that additions need not wait for each other.
template <class F>
float row_sum(int64_t width, const F& f) {
  Vec s[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= width; i += 4 * W)
    for (int k = 0; k < 4; ++k) s[k] += f(i + k * W, W);
  for (; i < width; i += W) s[0] += keep_first(f(i, lanes(i, width)), lanes(i, width), 0.0f);
  return sum((s[0] + s[1]) + (s[2] + s[3]));
}

template <bool centered, class T>
void forward(const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias,
             const Tensor& y, const Tensor& h, const Tensor& mean, const Tensor& rstd, float eps) {
  const int64_t rows = x.size[0], width = x.size[1];
  const Param<T> w(weight, 1.0f), b(bias, 0.0f);
  parallel_for((rows + kBlock - 1) / kBlock, false, [&](int64_t block) {
    for (int64_t n = block * kBlock; n < std::min(rows, (block + 1) * kBlock); ++n) {
      const T* row = x.as<T>() + n * width;
      if (residual) {
        const T* r = residual.as<T>() + n * width;
        T* sum_row = h.as<T>() + n * width;
        for (int64_t i = 0; i < width; i += W) {
          const int k = lanes(i, width);
          store(sum_row + i, load(row + i, k) + load(r + i, k), k);
        }
        row = sum_row;
      }
      const auto at = [&](int64_t i, int k) { return load(row + i, k); };
      float m = 0;
      if constexpr (centered) m = row_sum(width, at) / width;
      const float square = row_sum(width, [&](int64_t i, int k) {
        const Vec d = at(i, k) - m;
        return d * d;
      });
      const float scale = 1.0f / std::sqrt(square / width + eps);
      if constexpr (centered) mean.as<float>()[n] = m;
      rstd.as<float>()[n] = scale;
      T* out = y.as<T>() + n * width;
      for (int64_t i = 0; i < width; i += W) {
        const int k = lanes(i, width);
        store(out + i, fma((at(i, k) - m) * scale, w.at(i, k), b.at(i, k)), k);
      }
    }
  });
}

// Rows of `block` into its partial sums of dweight and dbias, (2, width); dx on the way.
template <bool centered, class T>
void backward_block(int64_t first, int64_t last, int64_t width, const Tensor& dy, const Tensor& dh,
                    const Tensor& h, const Param<T>& w, const float* mean, const float* rstd,
                    const Tensor& dx, float* dweight, float* dbias) {
  for (int64_t n = first; n < last; ++n) {
    const T *g_row = dy.as<T>() + n * width, *h_row = h.as<T>() + n * width;
    const float m = centered ? mean[n] : 0.0f, scale = rstd[n];
    const auto normal = [&](int64_t i, int k) { return (load(h_row + i, k) - m) * scale; };
    if (dweight)
      for (int64_t i = 0; i < width; i += W) {
        const int k = lanes(i, width);
        const Vec g = load(g_row + i, k);
        store(dweight + i, fma(g, normal(i, k), load(dweight + i, k)), k);
        if (centered) store(dbias + i, load(dbias + i, k) + g, k);
      }
    if (!dx) continue;
    const auto g = [&](int64_t i, int k) { return load(g_row + i, k) * w.at(i, k); };
    const float avg_gn = row_sum(width, [&](int64_t i, int k) { return g(i, k) * normal(i, k); }) / width;
    const float avg_g = centered ? row_sum(width, g) / width : 0.0f;
    T* out = dx.as<T>() + n * width;
    const T* extra = dh ? dh.as<T>() + n * width : nullptr;
    for (int64_t i = 0; i < width; i += W) {
      const int k = lanes(i, width);
      Vec d = (g(i, k) - avg_g - normal(i, k) * avg_gn) * scale;
      if (extra) d += load(extra + i, k);
      store(out + i, d, k);
    }
  }
}

void store_param(const Tensor& to, int64_t i, Vec x, int n) {
  with_type(to.dtype, [&](auto t) { store(to.as<decltype(t)>() + i, x, n); });
}

template <bool centered, class T>
void backward(const Tensor& dy, const Tensor& dh, const Tensor& h, const Tensor& weight,
              const Tensor& mean, const Tensor& rstd, const Tensor& dx, const Tensor& dweight,
              const Tensor& dbias) {
  const int64_t rows = h.size[0], width = h.size[1];
  const int64_t blocks = (rows + kBlock - 1) / kBlock, groups = std::min<int64_t>(blocks, 64);
  const bool params = dweight || dbias;
  const Param<T> w(weight, 1.0f);
  std::unique_ptr<float[]> partial(params ? new float[groups * 2 * width]() : nullptr);
  parallel_for(groups, false, [&](int64_t group) {  // 64 groups however many threads: same bits
    float* own = params ? partial.get() + group * 2 * width : nullptr;
    for (int64_t b = group * blocks / groups; b < (group + 1) * blocks / groups; ++b)
      backward_block<centered, T>(b * kBlock, std::min(rows, (b + 1) * kBlock), width, dy, dh, h, w,
                                  mean.as<float>(), rstd.as<float>(), dx, own, own ? own + width : nullptr);
  });
  if (!params) return;
  for (int64_t i = 0; i < width; i += W) {
    const int k = lanes(i, width);
    Vec sw{}, sb{};
    for (int64_t group = 0; group < groups; ++group) {
      sw += load(partial.get() + group * 2 * width + i, k);
      sb += load(partial.get() + (group * 2 + 1) * width + i, k);
    }
    if (dweight) store_param(dweight, i, sw, k);
    if (dbias) store_param(dbias, i, sb, k);
  }
}

}  // namespace

void layer_norm_fwd(Tensor x, Tensor residual, Tensor weight, Tensor bias, double eps, Tensor y, Tensor h,
                    Tensor mean, Tensor rstd) {
  with_type(x.dtype, [&](auto t) {
    forward<true, decltype(t)>(x, residual, weight, bias, y, h, mean, rstd, static_cast<float>(eps));
  });
}

void layer_norm_bwd(Tensor dy, Tensor dh, Tensor h, Tensor weight, Tensor, Tensor mean, Tensor rstd, double,
                    std::vector<bool>, Tensor dx, Tensor dweight, Tensor dbias) {
  with_type(h.dtype, [&](auto t) {
    backward<true, decltype(t)>(dy, dh, h, weight, mean, rstd, dx, dweight, dbias);
  });
}

void rms_norm_fwd(Tensor x, Tensor residual, Tensor weight, double eps, Tensor y, Tensor h, Tensor rstd) {
  with_type(x.dtype, [&](auto t) {
    forward<false, decltype(t)>(x, residual, weight, {}, y, h, {}, rstd, static_cast<float>(eps));
  });
}

void rms_norm_bwd(Tensor dy, Tensor dh, Tensor h, Tensor weight, Tensor rstd, double, std::vector<bool>,
                  Tensor dx, Tensor dweight) {
  with_type(h.dtype, [&](auto t) {
    backward<false, decltype(t)>(dy, dh, h, weight, {}, rstd, dx, dweight, {});
  });
}

KERNEL(layer_norm_fwd);
KERNEL(layer_norm_bwd);
KERNEL(rms_norm_fwd);
KERNEL(rms_norm_bwd);

}  // namespace llmkern
