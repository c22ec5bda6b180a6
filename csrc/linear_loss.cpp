// linear_cross_entropy: cross_entropy of z = cap(x Wᵀ + b), a tile of logits at a time:
//
//   loss = (1 - ε) w[t] (lse - z[t]) + ε/C Σ w (lse - z) + ζ lse²,   lse = top + log_total
//   dz   = dloss (p ((1 - ε) w[t] + ε/C Σ w + 2 ζ lse) - ε/C w - (1 - ε) w[t] 1[t]) (1 - (z / κ)²)
//   dx   = dz W,   dW = dzᵀ x,   db = Σ dz
//
// Blocks of kCols classes are the outer loop: each is packed once, and its part of dW is complete, and
// rounded, before the next.  Within one, chunks of kRows rows make tiles of logits or of dz that stay in
// the shared cache: 8 MiB of float.  Memory beside the results does not grow with the classes.
//
// Where forward knows the gradient of its losses (their sum, or mean), it makes all gradients at once, which
// saves the second product of logits, one of four: linear_loss_early.h.
//
// Rows that are ignored are left out of every product.

#include "linear_loss_early.h"

namespace llmkern {
namespace loss_of_linear {
namespace {

constexpr int64_t kRows = 2048;  // of a chunk

template <class T>
void forward(const Kept<T>& kept, const Head<T>& head, const Losses<T>& losses) {
  const int64_t classes = head.weight.rows, width = ceil_div(std::min(kCols, classes), W) * W;
  const Buffer tile(std::min(kRows, kept.count()) * width * sizeof(float));
  std::vector<Row> rows(kept.count());
  double seen = 0;
  for_parts(classes, kCols, [&](int64_t col, int64_t cols) {
    const Packed<T> packed(head.weight.some_rows(col, cols));
    for_parts(kept.count(), kRows, [&](int64_t first, int64_t count) {
      const auto epilogue = [&](int64_t row, int64_t j, Vec v, int n) {
        store(tile.as<float>() + row * width + j, head.logits(v, col + j, n));
      };
      multiply(kept.x(first, count), packed, epilogue, {Touched(tile.as<float>(), width)});
      parallel_for(count, false, [&](int64_t i) {
        losses.see(rows[first + i], first + i, tile.as<float>() + i * width, col, cols, seen);
      });
    });
    for (int64_t j = col; j < col + cols; ++j) seen += losses.weight(j);
  });
  for (int64_t i = 0; i < kept.count(); ++i) losses.finish(rows[i], i, classes, seen);
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

// dz of a tile, in the dtype of the products that it enters.
template <class T>
void gradient_tile(const Matrix<const T>& x, const Packed<T>& packed, const Head<T>& head,
                   const ClassWeight<T>& weight, const RowGradient* rows, int64_t col, bool smooth,
                   const Matrix<T>& dz) {
  const auto epilogue = [&](int64_t i, int64_t j, Vec v, int n) {
    const int64_t c = col + j;
    store(dz.at(i, j), gradient(head, weight, rows[i], head.logits(v, c, n), c, n, smooth), n);
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
      add_columns(dz, 0, bias_sum, first == 0, last);
    });
  });
}

Options options(int64_t ignore_index, int64_t first, int64_t classes, double smoothing, double z_loss,
                double softcap) {
  const auto narrow = [](double v) { return static_cast<float>(v); };
  return {ignore_index, first, classes, narrow(smoothing), narrow(z_loss), narrow(softcap)};
}

}  // namespace
}  // namespace loss_of_linear

void linear_cross_entropy_fwd(Tensor x, Tensor head, Tensor bias, Tensor target, Tensor weight, Tensor factor,
                              int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
                              int64_t first, int64_t classes, std::vector<bool>, Tensor loss, Tensor top,
                              Tensor log_total, Tensor dx, Tensor dhead, Tensor dbias) {
  using namespace loss_of_linear;
  check_targets("linear_cross_entropy", target, classes, ignore_index);
  const Options given = options(ignore_index, first, classes, label_smoothing, z_loss, softcap);
  for (const Tensor& out : {loss, top, log_total}) std::fill_n(out.as<float>(), out.count(), 0.0f);
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    const Head<T> layer{Matrix<const T>(head), bias.as<T>(), given.softcap};
    const Kept<T> kept(x, target, ignore_index);
    const ClassWeight<T> w = ClassWeight<T>(weight).from(first);
    const Losses<T> losses{kept, target, w, given, loss.as<float>(), top.as<float>(), log_total.as<float>()};
    if (dx.count() || dhead.count() || dbias.count())
      Early<T>(kept, layer, losses, factor, dx, dhead, dbias).run();
    else
      forward(kept, layer, losses);
  });
}

void linear_cross_entropy_bwd(Tensor dloss, Tensor x, Tensor head, Tensor bias, Tensor target, Tensor weight,
                              Tensor top, Tensor log_total, Tensor factor, Tensor early_dx, Tensor early_dhead,
                              Tensor early_dbias, int64_t ignore_index, double label_smoothing, double z_loss,
                              double softcap, int64_t first, int64_t classes, std::vector<bool>, Tensor dx,
                              Tensor dhead, Tensor dbias) {
  using namespace loss_of_linear;
  const Options given = options(ignore_index, first, classes, label_smoothing, z_loss, softcap);
  const std::pair<const Tensor&, const Tensor&> pairs[] = {
      {early_dx, dx}, {early_dhead, dhead}, {early_dbias, dbias}};
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    const Kept<T> kept(x, target, ignore_index);
    const float times = multiple(kept, dloss, factor);
    bool made = times == times;
    for (const auto& [early, out] : pairs) made = made && early.count() >= out.count();
    if (made) {
      for (const auto& [early, out] : pairs) scale<T>(early, times, out);
      return;
    }
    const ClassWeight<T> w = ClassWeight<T>(weight).from(first);
    const Head<T> layer{Matrix<const T>(head), bias.as<T>(), given.softcap};
    const auto rows = row_gradients(kept, dloss, target, w, top.as<float>(), log_total.as<float>(), given, 0,
                                    kept.count());
    backward(kept, layer, w, rows, given.smoothing > 0, dx, dhead, dbias);
  });
}

KERNEL(linear_cross_entropy_fwd);
KERNEL(linear_cross_entropy_bwd);

}  // namespace llmkern
