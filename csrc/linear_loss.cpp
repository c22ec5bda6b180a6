// linear_cross_entropy: cross_entropy of z = cap(x Wᵀ + b), a tile of logits at a time:
//
//   loss = (1 - ε) w[t] (lse - z[t]) + ε/C Σ w (lse - z) + ζ lse²,   lse = top + log_total
//   dz   = dloss (p ((1 - ε) w[t] + ε/C Σ w + 2 ζ lse) - ε/C w - (1 - ε) w[t] 1[t]) (1 - (z / κ)²)
//   dx   = dz W,   dW = dzᵀ x,   db = Σ dz
//
// Blocks of kCols classes are the outer loop: each is packed once, and its part of dW is complete, and
// rounded, before the next.  Within one, chunks of kRows rows make tiles of logits or of dz that stay in
// the shared cache: 8 MiB of float.  Memory beside the results does not grow with the classes.
// Rows that are ignored are left out of every product.

#include <limits>

#include "gemm.h"
#include "loss.h"

namespace llmkern {
namespace {

constexpr int64_t kRows = 2048, kCols = 1024;  // fixed, so that sums do not depend on the thread count

struct Options {
  int64_t ignore_index;
  float smoothing, z_loss, softcap;
};

// tanh, by Lambert's continued fraction to x⁷ near 0, where 1 - 2 / (e^2x + 1) would cancel.
Vec tanh(Vec x) {
  const Vec a = floats(bits(x) & 0x7fffffff), s = x * x;
  const Vec above = fma(fma(s + 378.0f, s, set(17325.0f)), s, set(135135.0f));
  const Vec below = fma(fma(fma(s, set(28.0f), set(3150.0f)), s, set(62370.0f)), s, set(135135.0f));
  const Vec far = 1.0f - 2.0f / (exp(a + a) + 1.0f);
  return a < 0.6f ? x * (above / below) : x < 0.0f ? -far : far;
}

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

template <class T>
void forward(const Kept<T>& kept, const Head<T>& head, const Tensor& target, const ClassWeight<T>& weight,
             const Options& options, float* loss, float* top, float* log_total) {
  const int64_t classes = head.weight.rows, width = ceil_div(std::min(kCols, classes), W) * W;
  const Buffer tile(std::min(kRows, kept.count()) * width * sizeof(float));
  std::vector<Row> rows(kept.count());
  const auto target_of = [&](int64_t i) {
    return target.as<int64_t>()[kept.index(i) * target.stride[0]];
  };
  double seen = 0;
  for_parts(classes, kCols, [&](int64_t col, int64_t cols) {
    const Packed<T> packed(head.weight.some_rows(col, cols));
    for_parts(kept.count(), kRows, [&](int64_t first, int64_t count) {
      const auto epilogue = [&](int64_t row, int64_t j, Vec v, int n) {
        store(tile.as<float>() + row * width + j, head.logits(v, col + j, n));
      };
      multiply(kept.x(first, count), packed, epilogue, {Touched(tile.as<float>(), width)});
      parallel_for(count, false, [&](int64_t i) {
        const float* z = tile.as<float>() + i * width;
        Row& row = rows[first + i];
        const int64_t t = target_of(first + i) - col;
        if (t >= 0 && t < cols) row.z_target = z[t];
        row.add(z, col, cols, weight, static_cast<float>(seen), options.smoothing > 0);
      });
    });
    for (int64_t j = col; j < col + cols; ++j) seen += weight(j);
  });
  for (int64_t i = 0; i < kept.count(); ++i) {
    const Row& row = rows[i];
    const float log_sum = std::log(row.total), lse = row.top + log_sum;
    float l = (1 - options.smoothing) * weight(target_of(i)) * (log_sum + (row.top - row.z_target));
    if (options.smoothing > 0)
      l += options.smoothing / classes * (row.gap + static_cast<float>(seen) * log_sum);
    const int64_t n = kept.index(i);
    loss[n] = options.z_loss > 0 ? l + options.z_loss * lse * lse : l;
    top[n] = row.top;
    log_total[n] = log_sum;
  }
}

// Factors of a row's gradient: dz = p · from_p - w · from_w - hot at the target.
struct RowGradient {
  float top, log_total, from_p, from_w, hot;
  int64_t target;
};

template <class T>
std::vector<RowGradient> row_gradients(const Kept<T>& kept, const Tensor& dloss, const Tensor& target,
                                       const ClassWeight<T>& weight, const Tensor& top,
                                       const Tensor& log_total, int64_t classes, const Options& options) {
  const float total = weight.total(classes), share = options.smoothing / classes;
  std::vector<RowGradient> rows;
  for (int64_t i = 0; i < kept.count(); ++i) {
    const int64_t n = kept.index(i), t = target.as<int64_t>()[n * target.stride[0]];
    const float d = dloss.as<float>()[n], m = top.as<float>()[n], l = log_total.as<float>()[n];
    const float hot = (1 - options.smoothing) * weight(t);
    const float from_lse = options.z_loss > 0 ? 2 * options.z_loss * (m + l) : 0.0f;
    rows.push_back({m, l, d * (hot + share * total + from_lse), d * share, d * hot, t});
  }
  return rows;
}

// A gradient that several products add to: in float, only the last sum is rounded to T.
template <class T>
class Sum {
 public:
  Sum(T* out, int64_t count) : out_(out), partial_(rounds() && out ? count * sizeof(float) : 0) {}
  explicit operator bool() const { return out_; }
  void add(int64_t i, Vec v, int n, bool first, bool last) const {
    float* partial = reinterpret_cast<float*>(out_ + i);
    if (rounds()) partial = partial_.as<float>() + i;
    if (!first) v += load(partial, n);
    if (last)
      store(out_ + i, v, n);
    else
      store(partial, v, n);
  }

 private:
  static constexpr bool rounds() { return sizeof(T) < sizeof(float); }
  T* const out_;
  const Buffer partial_;
};

// sum(col) += the sums of the columns, rows in order.
template <class T>
void add_columns(const Matrix<T>& m, const Sum<T>& sum, bool first, bool last) {
  constexpr int64_t kStrip = 4 * W;
  if (!sum) return;
  parallel_for(ceil_div(m.cols, kStrip), false, [&](int64_t strip) {
    const int64_t begin = strip * kStrip, end = std::min(m.cols, begin + kStrip);
    Vec sums[kStrip / W] = {};
    for (int64_t i = 0; i < m.rows; ++i)
      for (int64_t j = begin; j < end; j += W) sums[(j - begin) / W] += load(m.at(i, j), lanes(j, end));
    for (int64_t j = begin; j < end; j += W) sum.add(j, sums[(j - begin) / W], lanes(j, end), first, last);
  });
}

// dz of a tile, in the dtype of the products that it enters.
template <class T>
void gradient_tile(const Matrix<const T>& x, const Packed<T>& packed, const Head<T>& head,
                   const ClassWeight<T>& weight, const RowGradient* rows, int64_t col, bool smooth,
                   const Matrix<T>& dz) {
  const auto epilogue = [&](int64_t i, int64_t j, Vec v, int n) {
    const RowGradient& row = rows[i];
    const int64_t c = col + j;
    const Vec z = head.logits(v, c, n);
    Vec g = softmax_exp(z - row.top - row.log_total) * row.from_p;
    if (smooth) g -= weight(c, n) * row.from_w;
    if (row.target >= c && row.target < c + n) g[row.target - c] -= row.hot;
    store(dz.at(i, j), head.softcap > 0 ? g * head.slope(z) : g, n);
  };
  multiply(x, packed, epilogue, {Touched(dz.data, dz.row_stride)});
}

template <class T>
void backward(const Kept<T>& kept, const Head<T>& head, const ClassWeight<T>& weight,
              const std::vector<RowGradient>& rows, bool smooth, const Tensor& dx, const Tensor& dhead,
              const Tensor& dbias) {
  const int64_t classes = head.weight.rows, dim = head.weight.cols;
  const Buffer tile(std::min(kRows, kept.count()) * std::min(kCols, classes) * sizeof(T));
  if (dx.count()) std::fill_n(dx.as<T>(), dx.count(), T{});  // ignored rows stay 0
  const Sum<T> x_sum(dx.count() ? dx.as<T>() : nullptr, dx.count());
  for_parts(classes, kCols, [&](int64_t col, int64_t cols) {
    const Matrix<const T> part = head.weight.some_rows(col, cols);
    const Packed<T> packed(part), packed_t(x_sum ? part.t() : part.some_rows(0, 0));
    const Sum<T> head_sum(dhead.count() ? dhead.as<T>() + col * dim : nullptr, cols * dim);
    const Sum<T> bias_sum(dbias.count() ? dbias.as<T>() + col : nullptr, cols);
    for_parts(kept.count(), kRows, [&](int64_t first, int64_t count) {
      const Matrix<T> dz(tile.as<T>(), count, cols);
      const Matrix<const T> x = kept.x(first, count);
      const bool last = first + count == kept.count();
      gradient_tile(x, packed, head, weight, rows.data() + first, col, smooth, dz);
      const auto to_x = [&](int64_t i, int64_t j, Vec v, int n) {
        x_sum.add(kept.index(first + i) * dim + j, v, n, col == 0, col + cols == classes);
      };
      const auto to_head = [&](int64_t i, int64_t j, Vec v, int n) {
        head_sum.add(i * dim + j, v, n, first == 0, last);
      };
      if (x_sum) multiply(Matrix<const T>(dz), packed_t, to_x);
      if (head_sum) multiply(Matrix<const T>(dz.t()), x.t(), to_head);
      add_columns(dz, bias_sum, first == 0, last);
    });
  });
}

Options options(int64_t ignore_index, double smoothing, double z_loss, double softcap) {
  return {ignore_index, static_cast<float>(smoothing), static_cast<float>(z_loss),
          static_cast<float>(softcap)};
}

}  // namespace

void linear_cross_entropy_fwd(Tensor x, Tensor head, Tensor bias, Tensor target, Tensor weight,
                              int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
                              Tensor loss, Tensor top, Tensor log_total) {
  check_targets("linear_cross_entropy", target, head.size[0], ignore_index);
  const Options given = options(ignore_index, label_smoothing, z_loss, softcap);
  for (const Tensor& out : {loss, top, log_total}) std::fill_n(out.as<float>(), out.count(), 0.0f);
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    const Head<T> layer{Matrix<const T>(head), bias.as<T>(), given.softcap};
    forward(Kept<T>(x, target, ignore_index), layer, target, ClassWeight<T>(weight), given,
            loss.as<float>(), top.as<float>(), log_total.as<float>());
  });
}

void linear_cross_entropy_bwd(Tensor dloss, Tensor x, Tensor head, Tensor bias, Tensor target, Tensor weight,
                              Tensor top, Tensor log_total, int64_t ignore_index, double label_smoothing,
                              double z_loss, double softcap, std::vector<bool>, Tensor dx, Tensor dhead,
                              Tensor dbias) {
  const Options given = options(ignore_index, label_smoothing, z_loss, softcap);
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    const Kept<T> kept(x, target, ignore_index);
    const ClassWeight<T> w(weight);
    const Head<T> layer{Matrix<const T>(head), bias.as<T>(), given.softcap};
    const auto rows = row_gradients(kept, dloss, target, w, top, log_total, head.size[0], given);
    backward(kept, layer, w, rows, given.smoothing > 0, dx, dhead, dbias);
  });
}

KERNEL(linear_cross_entropy_fwd);
KERNEL(linear_cross_entropy_bwd);

}  // namespace llmkern
