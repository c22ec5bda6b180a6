// layer_norm and rms_norm, with an optional residual add.
//
//   y = (h - mean) * rstd * weight + bias,   h = x + residual,   rms_norm: mean = 0, bias = 0
//
// Backward, with n = (h - mean) * rstd and g = dy * weight:
//   dx = rstd * (g - avg(g) - n * avg(g * n)) + dh,   dweight = Σ_rows dy * n,   dbias = Σ_rows dy
//
// Memory is the limit: a row is read once and stays in the first cache for its two or three passes, and
// outputs that no cache would keep are streamed past it, which spares reading what is overwritten.
// Backward takes four rows together, so that the sums of dweight and dbias cross the cache once for four
// elements, and 16 chains of additions run beside each other.

#include <algorithm>
#include <type_traits>

#include "buffer.h"
#include "simd.h"
#include "threads.h"

namespace llmkern {
namespace {

constexpr int64_t kBlock = 32;   // rows a task; fixed, so that sums do not depend on the thread count
constexpr int64_t kGroups = 64;  // most parts of the rows whose dweight and dbias are summed apart
constexpr int kTogether = 4;     // rows of backward
constexpr std::integral_constant<int, W> kWhole{};

// f(i, n) for each vector of a row; for whole ones n is a constant, so that their masks vanish.
template <class F>
void each_vector(int64_t width, const F& f) {
  int64_t i = 0;
  for (; i + W <= width; i += W) f(i, kWhole);
  if (i < width) f(i, static_cast<int>(width - i));
}

// Σ f(i, n) over a row, in four sums so that additions need not wait for each other.
template <class F>
float row_sum(int64_t width, const F& f) {
  Vec s[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= width; i += 4 * W)
    for (int k = 0; k < 4; ++k) s[k] += f(i + k * W, kWhole);
  for (; i + W <= width; i += W) s[0] += f(i, kWhole);
  const int rest = static_cast<int>(width - i);
  if (rest) s[1] += keep_first(f(i, rest), rest, 0.0f);
  return sum((s[0] + s[1]) + (s[2] + s[3]));
}

// Writes n lanes, whole vectors past the caches if `streamed`.
template <class T, class N>
void put(T* to, Vec x, N n, bool streamed) {
  if constexpr (std::is_same_v<T, float> && std::is_same_v<N, std::remove_const_t<decltype(kWhole)>>)
    if (streamed) return stream(to, x);
  store(to, x, n);
}

// A weight or bias as floats; absent: a constant.
class Param {
 public:
  Param(const Tensor& t, int64_t width, float absent)
      : own_(t && t.dtype == DType::f32 ? 0 : (width + W) * sizeof(float)),
        data(t && t.dtype == DType::f32 ? t.as<float>() : own_.as<float>()) {
    float* to = own_.as<float>();
    if (!t) {
      std::fill_n(to, width, absent);
    } else if (data == to) {
      with_type(t.dtype, [&](auto type) {
        const auto* from = t.as<decltype(type)>();
        each_vector(width, [&](int64_t i, auto n) { store(to + i, load(from + i, n)); });
      });
    }
  }

 private:
  Buffer own_;

 public:
  const float* const data;
};

template <bool centered, class T>
void forward(const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias,
             const Tensor& y, const Tensor& h, const Tensor& mean, const Tensor& rstd, float eps) {
  const int64_t rows = x.size[0], width = x.size[1];
  const Param weights(weight, width, 1.0f), biases(bias, width, 0.0f);
  const float *w = weights.data, *b = biases.data;
  const bool streamed = streams(y.as<T>(), rows, width);
  parallel_for((rows + kBlock - 1) / kBlock, false, [&](int64_t block) {
    for (int64_t r = block * kBlock; r < std::min(rows, (block + 1) * kBlock); ++r) {
      const T* row = x.as<T>() + r * width;
      if (residual) {
        const T* from = residual.as<T>() + r * width;
        T* to = h.as<T>() + r * width;
        each_vector(width, [&](int64_t i, auto n) { store(to + i, load(row + i, n) + load(from + i, n), n); });
        row = to;
      }
      float m = 0;
      if constexpr (centered) {
        m = row_sum(width, [&](int64_t i, auto n) { return load(row + i, n); }) / width;
        mean.as<float>()[r] = m;
      }
      const float square = row_sum(width, [&](int64_t i, auto n) {
        const Vec d = load(row + i, n) - m;
        return d * d;
      });
      const float scale = rstd.as<float>()[r] = 1.0f / std::sqrt(square / width + eps);
      T* out = y.as<T>() + r * width;
      each_vector(width, [&](int64_t i, auto n) {
        put(out + i, fma((load(row + i, n) - m) * scale, load(w + i, n), load(b + i, n)), n, streamed);
      });
    }
    if (streamed) finish_streams();
  });
}

// What backward reads and writes, as (rows, width); dh and dx may be null.
template <class T>
struct Rows {
  const T *dy, *dh, *h;
  const float *weight, *mean, *rstd;
  T* dx;
  int64_t width;
  bool streamed;  // dx
};

// Rows first .. first + count - 1 into the sums dweight and dbias (null: not wanted); dx on the way.
template <bool centered, int count, class T>
void backward_rows(const Rows<T>& t, int64_t first, float* dweight, float* dbias) {
  const T *dy[count], *h[count];
  float m[count], scale[count];
  Vec sum_g[count] = {}, sum_gn[count] = {};
  for (int r = 0; r < count; ++r) {
    dy[r] = t.dy + (first + r) * t.width;
    h[r] = t.h + (first + r) * t.width;
    m[r] = centered ? t.mean[first + r] : 0.0f;
    scale[r] = t.rstd[first + r];
  }
  each_vector(t.width, [&](int64_t i, auto n) {
    const Vec w = load(t.weight + i, n);
    Vec dw = dweight ? load(dweight + i, n) : Vec{}, db = dbias ? load(dbias + i, n) : Vec{};
    for (int r = 0; r < count; ++r) {
      const Vec d = load(dy[r] + i, n), normal = (load(h[r] + i, n) - m[r]) * scale[r], g = d * w;
      dw = fma(d, normal, dw);
      db += d;
      sum_gn[r] += keep_first(g * normal, n, 0.0f);  // past the row `normal` may be infinite
      if (centered) sum_g[r] += g;
    }
    if (dweight) store(dweight + i, dw, n);
    if (dbias) store(dbias + i, db, n);
  });
  if (!t.dx) return;
  for (int r = 0; r < count; ++r) {
    const float avg_gn = sum(sum_gn[r]) / t.width, avg_g = centered ? sum(sum_g[r]) / t.width : 0.0f;
    T* dx = t.dx + (first + r) * t.width;
    const T* dh = t.dh ? t.dh + (first + r) * t.width : nullptr;
    each_vector(t.width, [&](int64_t i, auto n) {
      const Vec g = load(dy[r] + i, n) * load(t.weight + i, n), normal = (load(h[r] + i, n) - m[r]) * scale[r];
      const Vec d = (g - avg_g - normal * avg_gn) * scale[r];
      put(dx + i, dh ? d + load(dh + i, n) : d, n, t.streamed);
    });
  }
}

// The sums of `groups` parts, (groups, 2, width), in order, into dweight and dbias.
void add_parts(const float* parts, int64_t groups, int64_t width, const Tensor& dweight, const Tensor& dbias) {
  constexpr int64_t step = 8 * W;
  parallel_for((width + step - 1) / step, false, [&](int64_t part) {
    for (int64_t i = part * step; i < std::min(width, (part + 1) * step); i += W) {
      const int n = static_cast<int>(std::min<int64_t>(W, width - i));
      const Tensor* to[] = {&dweight, &dbias};
      for (int k = 0; k < 2; ++k) {
        if (!*to[k]) continue;
        Vec total{};
        for (int64_t group = 0; group < groups; ++group) total += load(parts + (2 * group + k) * width + i, n);
        with_type(to[k]->dtype, [&](auto t) { store(to[k]->template as<decltype(t)>() + i, total, n); });
      }
    }
  });
}

template <bool centered, class T>
void backward(const Tensor& dy, const Tensor& dh, const Tensor& h, const Tensor& weight,
              const Tensor& mean, const Tensor& rstd, const Tensor& dx, const Tensor& dweight,
              const Tensor& dbias) {
  const int64_t rows = h.size[0], width = h.size[1];
  const int64_t blocks = (rows + kBlock - 1) / kBlock, groups = std::min(blocks, kGroups);
  const Param weights(weight, width, 1.0f);
  const Rows<T> t{dy.as<T>(), dh.as<T>(), h.as<T>(), weights.data, mean.as<float>(), rstd.as<float>(),
                  dx.as<T>(), width, streams(dx.as<T>(), rows, width)};
  const Buffer parts((dweight || dbias ? groups * 2 * width : 0) * sizeof(float));
  parallel_for(groups, false, [&](int64_t group) {  // the same groups for any number of threads
    float* own = parts.as<float>() + group * 2 * width;
    float *dw = dweight ? own : nullptr, *db = dbias ? own + width : nullptr;
    if (dw) std::fill_n(dw, width, 0.0f);
    if (db) std::fill_n(db, width, 0.0f);
    const int64_t last = std::min(rows, (group + 1) * blocks / groups * kBlock);
    int64_t r = group * blocks / groups * kBlock;
    for (; r + kTogether <= last; r += kTogether) backward_rows<centered, kTogether>(t, r, dw, db);
    for (; r < last; ++r) backward_rows<centered, 1>(t, r, dw, db);
    if (t.streamed) finish_streams();
  });
  if (dweight || dbias) add_parts(parts.as<float>(), groups, width, dweight, dbias);
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
