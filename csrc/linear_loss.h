// What forward and backward of linear_cross_entropy share; linear_loss.cpp has the formulas.
#pragma once

#include <limits>

#include "gemm.h"
#include "loss.h"

namespace llmkern::loss_of_linear {

constexpr int64_t kCols = 1024;  // classes of a block; fixed, so that sums do not depend on the thread count

// The head may be a part of the layer: its classes are those from `first` on, of `classes` in all.
struct Options {
  int64_t ignore_index, first, classes;
  float smoothing, z_loss, softcap;
};

// The layer that makes logits of sums.
template <class T>
struct Head {
  const Matrix<const T> weight;
  const T* bias;
  const float softcap;

  Vec logits(Vec v, int64_t col, int n) const {
    if (bias) v += load(bias + col, n);
    return softcap > 0 ? softcap * tanh(v / softcap) : v;
  }
  Vec slope(Vec z) const {  // dz / dv
    const Vec t = z / softcap;
    return softcap > 0 ? 1.0f - t * t : set(1.0f);
  }
};

// The rows that count, side by side: x itself where none is ignored.
template <class T>
class Kept {
 public:
  Kept(const Tensor& x, const Tensor& target, int64_t ignore_index)
      : x_(x),
        all_(x_),
        index_(rows(target, ignore_index)),
        copy_(ignored() ? count() * x_.cols * sizeof(T) : 0) {
    if (!ignored()) return;
    all_ = Matrix<const T>(copy_.as<T>(), count(), x_.cols);
    parallel_for(count(), false, [&](int64_t i) {
      for (int64_t j = 0; j < x_.cols; ++j) copy_.as<T>()[i * x_.cols + j] = *x_.at(index_[i], j);
    });
  }
  int64_t count() const { return index_.size(); }
  int64_t index(int64_t i) const { return index_[i]; }
  Matrix<const T> x(int64_t first, int64_t n) const { return all_.some_rows(first, n); }

 private:
  bool ignored() const { return count() < x_.rows; }
  static std::vector<int64_t> rows(const Tensor& target, int64_t ignore_index) {
    std::vector<int64_t> kept;
    for (int64_t n = 0; n < target.size[0]; ++n)
      if (target.as<int64_t>()[n * target.stride[0]] != ignore_index) kept.push_back(n);
    return kept;
  }
  Matrix<const T> x_, all_;
  std::vector<int64_t> index_;
  Buffer copy_;
};

// Calls body(first, count) for parts of [0, n); once for none at all, so that sums become zeros.
template <class Body>
void for_parts(int64_t n, int64_t most, const Body& body) {
  int64_t first = 0;
  do {
    body(first, std::min(most, n - first));
    first += most;
  } while (first < n);
}

// What is known of a row of logits so far; `gap` is Σ w (top - z).
struct Row {
  float top = -std::numeric_limits<float>::infinity(), total = 0, gap = 0, z_target = 0;

  // `count` more logits from class `col` on; `seen` is the sum of the weights of those before.
  template <class Weight>
  void add(const float* z, int64_t col, int64_t count, const Weight& weight, float seen, bool smooth) {
    Vec m = set(top);
    for (int64_t i = 0; i < count; i += W) m = max(m, keep_first(load(z + i), lanes(i, count), top));
    const float higher = max_of(m);
    if (higher > top) {
      if (std::isfinite(top)) {
        total *= std::exp(top - higher);
        gap += seen * (higher - top);
      }
      top = higher;
    }
    const float shift = top == -std::numeric_limits<float>::infinity() ? 0.0f : top;
    Vec sums{}, gaps{};
    for (int64_t i = 0; i < count; i += W) {
      const int k = lanes(i, count);
      const Vec v = load(z + i) - shift;
      sums += keep_first(softmax_exp(v), k, 0.0f);
      if (smooth) gaps -= keep_first(weight(col + i, k) * v, k, 0.0f);
    }
    total += sum(sums);
    gap += sum(gaps);
  }
};

// The losses of rows whose logits were all seen; `seen` is the sum of their class weights.  A head that is a
// part gives its terms of the sums, and that of the target if it has it.
template <class T>
struct Losses {
  const Kept<T>& kept;
  const Tensor& target;
  const ClassWeight<T>& weight;  // of the head's own classes
  const Options& options;
  float *loss, *top, *log_total;

  // Counted from the head's first class, and outside of it where another part has the target.
  int64_t target_of(int64_t i) const {
    return target.as<int64_t>()[kept.index(i) * target.stride[0]] - options.first;
  }

  // Logits of the classes col .. of row i.
  void see(Row& row, int64_t i, const float* z, int64_t col, int64_t cols, double seen) const {
    const int64_t t = target_of(i) - col;
    if (t >= 0 && t < cols) row.z_target = z[t];
    row.add(z, col, cols, weight, static_cast<float>(seen), options.smoothing > 0);
  }
  void finish(const Row& row, int64_t i, int64_t classes, double seen) const {
    const float log_sum = std::log(row.total), lse = row.top + log_sum;
    const int64_t t = target_of(i);
    float l = 0;
    if (t >= 0 && t < classes) l = (1 - options.smoothing) * weight(t) * (log_sum + (row.top - row.z_target));
    if (options.smoothing > 0)
      l += options.smoothing / options.classes * (row.gap + static_cast<float>(seen) * log_sum);
    const int64_t n = kept.index(i);
    loss[n] = options.z_loss > 0 ? l + options.z_loss * lse * lse : l;
    top[n] = row.top;
    log_total[n] = log_sum;
  }
};

// Factors of a row's gradient: dz = p · from_p - w · from_w - hot at the target.
struct RowGradient {
  float top, log_total, from_p, from_w, hot;
  int64_t target;
};

template <class T>
std::vector<RowGradient> row_gradients(const Kept<T>& kept, const Tensor& dloss, const Tensor& target,
                                       const ClassWeight<T>& weight, const float* top, const float* log_total,
                                       const Options& options, int64_t first, int64_t count) {
  const float total = weight.from(-options.first).total(options.classes);
  const float share = options.smoothing / options.classes;
  std::vector<RowGradient> rows;
  for (int64_t i = first; i < first + count; ++i) {
    const int64_t n = kept.index(i), t = target.as<int64_t>()[n * target.stride[0]] - options.first;
    const float d = dloss.as<float>()[dloss.count() > 1 ? n : 0], m = top[n], l = log_total[n];
    const float hot = (1 - options.smoothing) * weight(t);
    const float from_lse = options.z_loss > 0 ? 2 * options.z_loss * (m + l) : 0.0f;
    rows.push_back({m, l, d * (hot + share * total + from_lse), d * share, d * hot, t});
  }
  return rows;
}

// sum(at + col) += the sums of the columns, rows in order.
template <class T, class Into>
void add_columns(const Matrix<T>& m, int64_t at, const Into& sum, bool first, bool last) {
  constexpr int64_t kStrip = 4 * W;
  if (!sum) return;
  parallel_for(ceil_div(m.cols, kStrip), false, [&](int64_t strip) {
    const int64_t begin = strip * kStrip, end = std::min(m.cols, begin + kStrip);
    Vec sums[kStrip / W] = {};
    for (int64_t i = 0; i < m.rows; ++i)
      for (int64_t j = begin; j < end; j += W) sums[(j - begin) / W] += load(m.at(i, j), lanes(j, end));
    for (int64_t j = begin; j < end; j += W) sum.add(at + j, sums[(j - begin) / W], lanes(j, end), first, last);
  });
}

// dz of n classes from c on, from their logits.
template <class T>
Vec gradient(const Head<T>& head, const ClassWeight<T>& weight, const RowGradient& row, Vec z, int64_t c, int n,
             bool smooth) {
  Vec g = softmax_exp(z - row.top - row.log_total) * row.from_p;
  if (smooth) g -= weight(c, n) * row.from_w;
  if (row.target >= c && row.target < c + n) g[row.target - c] -= row.hot;
  return head.softcap > 0 ? g * head.slope(z) : g;
}

}  // namespace llmkern::loss_of_linear
