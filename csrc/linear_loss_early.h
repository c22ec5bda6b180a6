// linear_cross_entropy: the losses and all gradients at once, where the gradient of the losses is known.
//
// Chunks of rows are the outer loop, and their logits wait whole, as floats.  dW is a sum over chunks, in
// float: its upper halves wait where the result will be, its lower halves beside it.
#pragma once

#include "linear_loss.h"
#include "pool.h"

namespace llmkern::loss_of_linear {

// Rows of a chunk: at most a quarter of all, so that their logits stay small beside what the op saves, and at
// most 512, 98 MiB for 50,257 classes.
inline int64_t early_rows(int64_t count) {
  return std::min<int64_t>(count, std::min<int64_t>(512, std::max<int64_t>(64, ceil_div(count, 4))));
}

// A gradient that chunks of rows add to: what is not float yet lies in two halves.
template <class T>
class SplitSum {
 public:
  SplitSum(T* out, int64_t count) : out_(out), low_(!is_float && out ? count * sizeof(uint16_t) : 0) {}
  explicit operator bool() const { return out_; }
  // What `add` reads and writes, from element i on, in rows of `width`.
  TouchedList touched(int64_t i, int64_t width) const {
    return {Touched(out_ + i, width), is_float ? Touched() : Touched(low_.as<uint16_t>() + i, width)};
  }
  void add(int64_t i, Vec v, int n, bool first, bool last) const {
    if (!first) v += sum_so_far(i, n);
    if (last || is_float) return store(out_ + i, v, n);
    store_half(out_ + i, bits(v) >> 16, n);
    store_half(low_.as<uint16_t>() + i, bits(v), n);
  }

 private:
  static constexpr bool is_float = sizeof(T) == sizeof(float);

  Vec sum_so_far(int64_t i, int n) const {
    if constexpr (is_float) return load(out_ + i, n);
    return floats(load_half(out_ + i, n) << 16 | load_half(low_.as<uint16_t>() + i, n));
  }
  static IntVec load_half(const void* from, int n) {
    HalfVec half{};
    std::memcpy(&half, from, n >= W ? sizeof half : n * sizeof(uint16_t));
    return __builtin_convertvector(half, IntVec);
  }
  static void store_half(void* to, IntVec value, int n) {
    const HalfVec half = __builtin_convertvector(value & 0xffff, HalfVec);
    if (n >= W)
      std::memcpy(to, &half, sizeof half);
    else
      std::memcpy(to, &half, n * sizeof(uint16_t));
  }

  T* const out_;
  const PooledBuffer low_;
};

// Losses, and all gradients of their sum times `factor`; gradients without elements are not wanted.
template <class T>
class Early {
 public:
  Early(const Kept<T>& kept, const Head<T>& head, const Losses<T>& losses, const Tensor& factor, const Tensor& dx,
        const Tensor& dhead, const Tensor& dbias)
      : kept_(kept), head_(head), losses_(losses), factor_(factor), dx_(dx.count() ? dx.as<T>() : nullptr),
        classes_(head.weight.rows), dim_(head.weight.cols), width_(ceil_div(classes_, W) * W),
        height_(early_rows(kept.count())), smooth_(losses.options.smoothing > 0),
        logits_(height_ * width_ * sizeof(float)), tile_(height_ * std::min(kCols, classes_) * sizeof(T)),
        x_sums_(dx_ ? height_ * dim_ * sizeof(float) : 0),
        head_sum_(dhead.count() ? dhead.as<T>() : nullptr, classes_ * dim_),
        bias_sum_(dbias.count() ? dbias.as<T>() : nullptr, classes_) {
    if (dx_) std::fill_n(dx_, dx.count(), T{});  // ignored rows stay 0
  }

  void run() const {
    for_parts(kept_.count(), height_, [&](int64_t first, int64_t count) {
      make_losses(first, count);
      make_gradients(first, count);
    });
  }

 private:
  float* logits(int64_t row, int64_t col) const { return logits_.as<float>() + row * width_ + col; }

  void make_losses(int64_t first, int64_t count) const {
    std::vector<Row> rows(count);
    double seen = 0;
    for_parts(classes_, kCols, [&](int64_t col, int64_t cols) {
      const auto epilogue = [&](int64_t i, int64_t j, Vec v, int n) {
        store(logits(i, col + j), head_.logits(v, col + j, n));
      };
      multiply(kept_.x(first, count), head_.weight.some_rows(col, cols), epilogue, {Touched(logits(0, col), width_)});
      parallel_for(count, false, [&](int64_t i) {
        losses_.see(rows[i], first + i, logits(i, col), col, cols, seen);
      });
      for (int64_t j = col; j < col + cols; ++j) seen += losses_.weight(j);
    });
    for (int64_t i = 0; i < count; ++i) losses_.finish(rows[i], first + i, classes_, seen);
  }

  void make_gradients(int64_t first, int64_t count) const {
    const bool first_chunk = first == 0, last_chunk = first + count == kept_.count();
    const Matrix<const T> x = kept_.x(first, count);
    const auto rows = row_gradients(kept_, factor_, losses_.target, losses_.weight, losses_.top,
                                    losses_.log_total, losses_.options, first, count);
    const Packed<T> packed_x(head_sum_ ? x.t() : x.some_rows(0, 0));
    for_parts(classes_, kCols, [&](int64_t col, int64_t cols) {
      const Matrix<T> dz(tile_.as<T>(), count, cols);
      parallel_for(count, false, [&](int64_t i) {
        for (int64_t j = 0; j < cols; j += W) {
          const int n = lanes(j, cols);
          const Vec z = load(logits(i, col + j), n);
          store(dz.at(i, j), gradient(head_, losses_.weight, rows[i], z, col + j, n, smooth_), n);
        }
      });
      add_to_x(dz, first, col, cols);
      const auto to_head = [&](int64_t i, int64_t j, Vec v, int n) {
        head_sum_.add((col + i) * dim_ + j, v, n, first_chunk, last_chunk);
      };
      if (head_sum_)
        multiply(Matrix<const T>(dz.t()), packed_x, to_head, head_sum_.touched(col * dim_, dim_));
      add_columns(dz, col, bias_sum_, first_chunk, last_chunk);
    });
  }

  void add_to_x(const Matrix<T>& dz, int64_t first, int64_t col, int64_t cols) const {
    if (!dx_) return;
    const bool last = col + cols == classes_;
    const auto epilogue = [&](int64_t i, int64_t j, Vec v, int n) {
      float* sum = x_sums_.as<float>() + i * dim_ + j;
      if (col) v += load(sum, n);
      if (last)
        store(dx_ + kept_.index(first + i) * dim_ + j, v, n);
      else
        store(sum, v, n);
    };
    multiply(Matrix<const T>(dz), head_.weight.some_rows(col, cols).t(), epilogue,
             {Touched(x_sums_.as<float>(), dim_)});
  }

  const Kept<T>& kept_;
  const Head<T>& head_;
  const Losses<T>& losses_;
  const Tensor& factor_;
  T* const dx_;
  const int64_t classes_, dim_, width_, height_;
  const bool smooth_;
  const PooledBuffer logits_;
  const Buffer tile_, x_sums_;
  const SplitSum<T> head_sum_, bias_sum_;
};

// to = from times `factor`, elements of one gradient.
template <class T>
void scale(const Tensor& from, float factor, const Tensor& to) {
  constexpr int64_t kPart = 1 << 16;
  parallel_for(ceil_div(to.count(), kPart), false, [&](int64_t part) {
    const int64_t end = std::min(to.count(), (part + 1) * kPart);
    for (int64_t i = part * kPart; i < end; i += W)
      store(to.as<T>() + i, load(from.as<T>() + i, lanes(i, end)) * factor, lanes(i, end));
  });
}

// What the gradients of the losses are a multiple of `factor` by; NaN if they are not, so that nothing is.
template <class T>
float multiple(const Kept<T>& kept, const Tensor& dloss, const Tensor& factor) {
  constexpr float kNone = std::numeric_limits<float>::quiet_NaN();
  if (!factor || !kept.count()) return kNone;
  const float d = dloss.as<float>()[kept.index(0)];
  for (int64_t i = 1; i < kept.count(); ++i)
    if (dloss.as<float>()[kept.index(i)] != d) return kNone;
  return d / *factor.as<float>();
}

}  // namespace llmkern::loss_of_linear
