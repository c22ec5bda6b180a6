// Operands of a product and their packing into panels.
//
// A product here is C[m][n] = Σ_k A[m][k] B[n][k]: both operands are rows over the depth k (as torch's
// linear has them), so one packing serves both.  A panel holds P rows with their depth outermost,
//   panel[k][p] = rows[first + p][k],   zeros past the last row,
// so that the microkernel reads it front to back.  Elements become 32-bit units: a float, or where the
// processor has a dot product of bfloat16 pairs, two neighbours along k (zero-padded to an even depth).
#pragma once

#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace llmkern {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A matrix anywhere in memory, any strides.
template <class T>
struct Matrix {
  T* data;
  int64_t rows, cols;
  int64_t row_stride, col_stride;

  Matrix(T* data, int64_t rows, int64_t cols) : Matrix(data, rows, cols, cols, 1) {}
  Matrix(T* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride)
      : data(data), rows(rows), cols(cols), row_stride(row_stride), col_stride(col_stride) {}
  explicit Matrix(const Tensor& t) : Matrix(t.as<T>(), t.size[0], t.size[1], t.stride[0], t.stride[1]) {}

  operator Matrix<const T>() const { return {data, rows, cols, row_stride, col_stride}; }
  Matrix t() const { return {data, cols, rows, col_stride, row_stride}; }
  Matrix some_rows(int64_t first, int64_t count) const {
    return {data + first * row_stride, count, cols, row_stride, col_stride};
  }
  T* at(int64_t row, int64_t col) const { return data + row * row_stride + col * col_stride; }
};

// How elements become units.  `k` is the depth that is left, `n` the rows.
template <class T>
struct FloatUnits {
  static constexpr int depth = 1;
  // W units of one row whose elements are neighbours
  static Vec along_depth(const T* p, int64_t k) {
    return load(p, static_cast<int>(std::min<int64_t>(W, k)));
  }
  // one unit of each of n rows that are neighbours
  static Vec along_rows(const T* p, int n, int64_t /*stride*/, int64_t /*k*/) { return load(p, n); }
  static float one(const T* p, int64_t /*stride*/, int64_t /*k*/) { return to_float(*p); }
};

struct PairUnits {
  static constexpr int depth = 2;
  static Vec along_depth(const bf16* p, int64_t k) {
    if (k >= 2 * W) return load(reinterpret_cast<const float*>(p));
    bf16 pairs[2 * W] = {};
    std::memcpy(pairs, p, k * sizeof(bf16));
    return load(reinterpret_cast<const float*>(pairs));
  }
  static Vec along_rows(const bf16* p, int n, int64_t stride, int64_t k) {
    return make_pairs(load(p, n), k > 1 ? load(p + stride, n) : Vec{});
  }
  static float one(const bf16* p, int64_t stride, int64_t k) {
    const bf16 pair[2] = {p[0], k > 1 ? p[stride] : bf16{0}};
    float unit;
    std::memcpy(&unit, pair, sizeof unit);
    return unit;
  }
};

template <class T>
using Units = std::conditional_t<has_bf16_dot && std::is_same_v<T, bf16>, PairUnits, FloatUnits<T>>;

// Floats from one panel to the next.  Panels narrower than a vector are written a vector at a time, each
// store's tail overwritten by the next one: the last needs room behind the panel.
template <int P>
constexpr int64_t panel_size(int64_t units) {
  static_assert(P % W == 0 || P < W);
  return units * P + (P < W ? W - P : 0);
}

// A part of a matrix on its way into panels: rows `first` on, columns `k0` to `k0 + depth`.
template <int P, class T>
class Packing {
 public:
  Packing(const Matrix<const T>& m, int64_t first, int64_t k0, int64_t depth)
      : from_(m.at(first, k0)),
        rows_(m.rows - first),
        depth_(depth),
        row_(m.row_stride),
        col_(m.col_stride) {}

  void run(int64_t panels, float* to) const {
    if (row_ == 1)
      neighbouring_rows(panels, to);
    else
      for (int64_t i = 0; i < panels; ++i, to += panel_size<P>(units()))
        col_ == 1 ? neighbouring_columns(i * P, to) : scattered(i * P, to);
  }

 private:
  using U = Units<T>;
  int64_t units() const { return ceil_div(depth_, U::depth); }

  // All panels at once, so that a line of memory is read once.
  void neighbouring_rows(int64_t panels, float* to) const {
    for (int64_t u = 0; u < units(); ++u) {
      const T* from = from_ + u * U::depth * col_;
      for (int64_t i = 0; i < panels; ++i)
        for (int p = 0; p < P; p += W) {
          const int n = static_cast<int>(std::min<int64_t>(W, rows_ - i * P - p));
          for (int k = 0; k < U::depth; ++k) prefetch(from + (8 * U::depth + k) * col_ + i * P + p);
          store(to + i * panel_size<P>(units()) + u * P + p,
                n > 0 ? U::along_rows(from + i * P + p, n, col_, depth_ - u * U::depth) : Vec{});
        }
    }
  }

  void neighbouring_columns(int64_t first, float* panel) const {
    for (int64_t u = 0; u < units(); u += W)
      for (int p = 0; p < P; p += W) {
        const T* from = from_ + (first + p) * row_ + u * U::depth;
        const int64_t rows = std::min<int64_t>(P, rows_ - first) - p;
        Vec block[W];
        for (int i = 0; i < W; ++i) {
          block[i] = i < rows ? U::along_depth(from + i * row_, depth_ - u * U::depth) : Vec{};
          prefetch_l2(from + i * row_ + 2 * W * U::depth);  // of many rows the processor follows only some
        }
        transpose(block);
        const int64_t n = std::min<int64_t>(W, units() - u);
        for (int64_t i = 0; i < n; ++i) store(panel + (u + i) * P + p, block[i]);
      }
  }

  void scattered(int64_t first, float* panel) const {
    for (int64_t u = 0; u < units(); ++u)
      for (int p = 0; p < P; ++p)
        panel[u * P + p] = first + p < rows_ ? U::one(from_ + (first + p) * row_ + u * U::depth * col_, col_,
                                                      depth_ - u * U::depth)
                                             : 0.0f;
  }

  const T* from_;
  int64_t rows_, depth_, row_, col_;
};

}  // namespace llmkern
