// What layers with weights share: a weight with its bias, gradients that several products add to, chunks
// of rows.
#pragma once

#include <algorithm>

#include "gemm.h"

namespace llmkern {

constexpr int64_t kChunk = 2048;  // rows; fixed, so that sums over rows do not depend on the thread count

// A weight (out, in) of any strides with its bias as floats, zeros where there is none.
template <class T>
class Linear {
 public:
  const Matrix<const T> weight;

  Linear(const Tensor& w, const Tensor& b) : weight(w), bias_(weight.rows * sizeof(float)) {
    for (int64_t i = 0; i < weight.rows; ++i)
      bias_.as<float>()[i] = b ? to_float(b.as<T>()[i * b.stride[0]]) : 0.0f;
  }
  explicit operator bool() const { return weight.data; }
  Vec bias(int64_t col, int n) const { return load(bias_.as<float>() + col, n); }

 private:
  Buffer bias_;
};

// A gradient that several products add to: in float, only the last sum is rounded to T.
template <class T>
class Sum {
 public:
  Sum(const Matrix<T>& out, int64_t terms)
      : out_(out), terms_(terms), partial_(rounds() && terms > 1 ? out.rows * out.cols * sizeof(float) : 0) {}
  Sum(const Tensor& out, int64_t terms)
      : Sum({out.as<T>(), out.dims > 1 ? out.size[0] : 1, out.dims ? out.size[out.dims - 1] : 0}, terms) {}

  // out += a bᵀ, where `out` is wanted
  void add(const Matrix<const T>& a, const Matrix<const T>& b) {
    if (out_.data) multiply(a, b, next(), {Touched(out_.data, out_.row_stride)});
  }
  // out += the sums of the columns, rows in order
  void add_columns(const Matrix<const T>& m) {
    if (!out_.data) return;
    const auto epilogue = next();
    parallel_for(ceil_div(m.cols, kStrip), false, [&](int64_t strip) {
      const int64_t first = strip * kStrip, last = std::min(m.cols, first + kStrip);
      Vec sums[kStrip / W] = {};
      for (int64_t row = 0; row < m.rows; ++row)
        for (int64_t j = first; j < last; j += W) sums[(j - first) / W] += load(m.at(row, j), lanes(j, last));
      for (int64_t j = first; j < last; j += W) epilogue(0, j, sums[(j - first) / W], lanes(j, last));
    });
  }

 private:
  static constexpr int64_t kStrip = 4 * W;
  static constexpr bool rounds() { return sizeof(T) < sizeof(float); }
  static int lanes(int64_t i, int64_t end) { return static_cast<int>(std::min<int64_t>(W, end - i)); }

  // The epilogue of the next term.
  auto next() {
    const int64_t term = term_++;
    return [this, term](int64_t row, int64_t col, Vec v, int n) {
      T* out = out_.at(row, col);
      float* partial = reinterpret_cast<float*>(out);
      if (rounds()) partial = partial_.as<float>() + row * out_.cols + col;
      if (term > 0) v += load(partial, n);
      if (term + 1 == terms_)
        store(out, v, n);
      else
        store(partial, v, n);
    };
  }

  Matrix<T> out_;
  int64_t terms_, term_ = 0;
  Buffer partial_;
};

// Calls body(first, count) for every chunk of rows; once for none at all, so that sums become zeros.
template <class Body>
void for_chunks(int64_t rows, const Body& body) {
  int64_t first = 0;
  do {
    body(first, std::min(kChunk, rows - first));
    first += kChunk;
  } while (first < rows);
}

}  // namespace llmkern
