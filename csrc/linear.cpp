// linear: y = x Wᵀ + b;  dx = dy W,  dW = dyᵀ x,  db = column sums of dy

#include "linear.h"

namespace llmkern {

void linear_fwd(Tensor x, Tensor weight, Tensor bias, Tensor y) {
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    const Linear<T> linear(weight, bias);
    const Matrix<T> out(y);
    const auto result = [&](int64_t row, int64_t col, Vec v, int n) {
      store(out.at(row, col), v + linear.bias(col, n), n);
    };
    multiply(Matrix<const T>(x), linear.weight, result, {Touched(out.data, out.row_stride)});
  });
}

void linear_bwd(Tensor dy, Tensor x, Tensor weight, Tensor, std::vector<bool>, Tensor dx, Tensor dweight,
                Tensor dbias) {
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    const Matrix<const T> dy_rows(dy), x_rows(x), w(weight);
    Sum<T>(dx, 1).add(dy_rows, w.t());
    Sum<T>(dweight, 1).add(dy_rows.t(), x_rows.t());
    Sum<T>(dbias, 1).add_columns(dy_rows);
  });
}

KERNEL(linear_fwd);
KERNEL(linear_bwd);

}  // namespace llmkern
