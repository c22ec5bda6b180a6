// ffn: y = h W_outᵀ + b_out,  h = f(u) or f(g) ∘ u,  u = x W_inᵀ + b_in,  g = x W_gateᵀ + b_gate
//
// Backward, with dh = dy W_out:
//   du = dh ∘ f'(u),  or with a gate  du = dh ∘ f(g),  dg = dh ∘ u ∘ f'(g)
//   dx = du W_in + dg W_gate,   dW_in = duᵀ x,  dW_gate = dgᵀ x,  dW_out = dyᵀ h,   db = column sums
//
// Rows go through in chunks, so that scratch stays bounded: h in forward; h, du and dg in backward.

#include <string>

#include "activation.h"
#include "linear.h"

namespace llmkern {
namespace {

bool wanted(const Tensor& t) { return t.count() > 0; }

template <class T, class F>
void forward(const Matrix<const T>& x, const Linear<T>& in, const Linear<T>& gate, const Linear<T>& out,
             bool keep, T* y, T* u, T* g) {
  const int64_t wide = in.weight.rows, dim_out = out.weight.rows;
  const Buffer hidden(std::min(kChunk, x.rows) * wide * sizeof(T));
  T* const h = hidden.as<T>();
  for_chunks(x.rows, [&](int64_t first, int64_t count) {
    const Matrix<const T> rows = x.some_rows(first, count);
    T* const u_rows = keep ? u + first * wide : h;
    T* const g_rows = keep ? g + first * wide : nullptr;
    T* const y_rows = y + first * dim_out;
    const auto only_u = [&](int64_t row, int64_t col, Vec v, int n) {
      store(u_rows + row * wide + col, v + in.bias(col, n), n);
    };
    const auto gated = [&](int64_t row, int64_t col, Vec v, int n) {
      const int64_t i = row * wide + col;
      v += gate.bias(col, n);
      if (keep) store(g_rows + i, v, n);
      store(h + i, F::value(v) * load(u_rows + i, n), n);
    };
    const auto activated = [&](int64_t row, int64_t col, Vec v, int n) {
      const int64_t i = row * wide + col;
      v += in.bias(col, n);
      if (keep) store(u_rows + i, v, n);
      store(h + i, F::value(v), n);
    };
    const auto result = [&](int64_t row, int64_t col, Vec v, int n) {
      store(y_rows + row * dim_out + col, v + out.bias(col, n), n);
    };
    const Touched to_u(u_rows, wide), to_g(g_rows, wide), to_h(h, wide), to_y(y_rows, dim_out);
    if (gate) {
      multiply(rows, in.weight, only_u, {to_u});
      multiply(rows, gate.weight, gated, {to_u, to_g, to_h});
    } else {
      multiply(rows, in.weight, activated, {to_u, to_h});
    }
    multiply(Matrix<const T>(h, count, wide), out.weight, result, {to_y});
  });
}

struct Gradients {
  Tensor x, weight_in, bias_in, weight_gate, bias_gate, weight_out, bias_out;
};

// h, du and dg of a chunk of rows, (rows, wide) each.
template <class T>
struct Hidden {
  const Buffer h_, du_, dg_;
  Matrix<T> h, du, dg;
  Hidden(int64_t rows, int64_t wide, bool gate)
      : h_(rows * wide * sizeof(T)),
        du_(rows * wide * sizeof(T)),
        dg_(gate ? rows * wide * sizeof(T) : 0),
        h(h_.as<T>(), rows, wide),
        du(du_.as<T>(), rows, wide),
        dg(gate ? dg_.as<T>() : nullptr, rows, wide) {}
};

template <class T, class F>
void backward_hidden(const Matrix<const T>& dy, const Matrix<const T>& weight_out, const T* u, const T* g,
                     const Hidden<T>& to) {
  const int64_t wide = to.h.cols;
  const auto epilogue = [&](int64_t row, int64_t col, Vec dh, int n) {
    const int64_t i = row * wide + col;
    const Activated a = F::both(load((g ? g : u) + i, n));
    if (g) {
      const Vec up = load(u + i, n);
      store(to.h.data + i, a.value * up, n);
      store(to.du.data + i, dh * a.value, n);
      store(to.dg.data + i, dh * up * a.slope, n);
    } else {
      store(to.h.data + i, a.value, n);
      store(to.du.data + i, dh * a.slope, n);
    }
  };
  const Touched to_h(to.h.data, wide), to_du(to.du.data, wide), to_dg(to.dg.data, wide);
  multiply(dy, weight_out.t(), epilogue, {Touched(u, wide), Touched(g, wide), to_h, to_du, to_dg});
}

template <class T, class F>
void backward(const Matrix<const T>& dy, const Matrix<const T>& x, const Matrix<const T>& weight_in,
              const Matrix<const T>& weight_gate, const Matrix<const T>& weight_out, const T* u, const T* g,
              const Gradients& to) {
  const int64_t wide = weight_in.rows, chunks = std::max<int64_t>(1, ceil_div(x.rows, kChunk));
  Sum<T> weight_in_sum(to.weight_in, chunks), bias_in_sum(to.bias_in, chunks);
  Sum<T> weight_gate_sum(to.weight_gate, chunks), bias_gate_sum(to.bias_gate, chunks);
  Sum<T> weight_out_sum(to.weight_out, chunks), bias_out_sum(to.bias_out, chunks);
  for_chunks(x.rows, [&](int64_t first, int64_t count) {
    const Matrix<const T> dy_rows = dy.some_rows(first, count), x_rows = x.some_rows(first, count);
    const Hidden<T> hidden(count, wide, g);
    const Matrix<const T> h = hidden.h, du = hidden.du, dg = hidden.dg;
    backward_hidden<T, F>(dy_rows, weight_out, u + first * wide, g ? g + first * wide : nullptr, hidden);
    T* const dx = wanted(to.x) ? to.x.as<T>() + first * x.cols : nullptr;
    Sum<T> x_sum(Matrix<T>(dx, count, x.cols), g ? 2 : 1);
    x_sum.add(du, weight_in.t());
    if (g) x_sum.add(dg, weight_gate.t());
    weight_in_sum.add(du.t(), x_rows.t());
    weight_gate_sum.add(dg.t(), x_rows.t());
    weight_out_sum.add(dy_rows.t(), h.t());
    bias_in_sum.add_columns(du);
    bias_gate_sum.add_columns(dg);
    bias_out_sum.add_columns(dy_rows);
  });
}

}  // namespace

void ffn_fwd(Tensor x, Tensor weight_in, Tensor bias_in, Tensor weight_gate, Tensor bias_gate,
             Tensor weight_out, Tensor bias_out, std::string activation, bool keep, Tensor y, Tensor u,
             Tensor g) {
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    const Linear<T> in(weight_in, bias_in), gate(weight_gate, bias_gate), out(weight_out, bias_out);
    with_activation(activation, [&](auto f) {
      forward<T, decltype(f)>(Matrix<const T>(x), in, gate, out, keep, y.as<T>(), u.as<T>(), g.as<T>());
    });
  });
}

void ffn_bwd(Tensor dy, Tensor x, Tensor weight_in, Tensor, Tensor weight_gate, Tensor, Tensor weight_out,
             Tensor, Tensor u, Tensor g, std::string activation, std::vector<bool>, Tensor dx,
             Tensor dweight_in, Tensor dbias_in, Tensor dweight_gate, Tensor dbias_gate, Tensor dweight_out,
             Tensor dbias_out) {
  const Gradients to{dx, dweight_in, dbias_in, dweight_gate, dbias_gate, dweight_out, dbias_out};
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    using M = Matrix<const T>;
    const T* gate = weight_gate ? g.as<T>() : nullptr;
    with_activation(activation, [&](auto f) {
      backward<T, decltype(f)>(M(dy), M(x), M(weight_in), M(weight_gate), M(weight_out), u.as<T>(), gate, to);
    });
  });
}

KERNEL(ffn_fwd);
KERNEL(ffn_bwd);

}  // namespace llmkern
