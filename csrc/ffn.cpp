// ffn: y = residual + drop(h W_outᵀ + b_out),  h = drop(f(u) or f(g) ∘ u),  u = x W_inᵀ + b_in,
//      g = x W_gateᵀ + b_gate
//
// Backward, with dh = dy W_out:
//   du = dh ∘ f'(u),  or with a gate  du = dh ∘ f(g),  dg = dh ∘ u ∘ f'(g)
//   dx = du W_in + dg W_gate,   dW_in = duᵀ x,  dW_gate = dgᵀ x,  dW_out = dyᵀ h,   db = column sums
//
// Rows go through in chunks, so that scratch stays bounded: h in forward; h, du and dg in backward, and u
// and g where backward makes them again.

#include <string>

#include "activation.h"
#include "linear.h"
#include "philox.h"

namespace llmkern {
namespace {

constexpr int64_t kOutputRows = int64_t{1} << 62;  // see OUTPUT_ROWS of llmkern/ops/ffn.py

bool wanted(const Tensor& t) { return t.count() > 0; }

// The two linears, or three, and what stands behind them.
template <class T>
struct Layer {
  const Linear<T> in, gate, out;
  const Dropout hidden_dropout, output_dropout;

  int64_t wide() const { return in.weight.rows; }
  int64_t dim_out() const { return out.weight.rows; }
};

// u, and with a gate g, of some rows, as backward needs them.
template <class T>
void before_activation(const Matrix<const T>& x, const Linear<T>& linear, T* to) {
  if (!linear) return;
  const int64_t wide = linear.weight.rows;
  const auto epilogue = [&](int64_t row, int64_t col, Vec v, int n) {
    store(to + row * wide + col, v + linear.bias(col, n), n);
  };
  multiply(x, linear.weight, epilogue, {Touched(to, wide)});
}

template <class T, class F>
void forward(const Matrix<const T>& x, const Layer<T>& layer, bool keep, const T* residual, T* y, T* u, T* g) {
  const int64_t wide = layer.wide(), dim_out = layer.dim_out();
  const Buffer hidden(std::min(kChunk, x.rows) * wide * sizeof(T));
  T* const h = hidden.as<T>();
  for_chunks(x.rows, [&](int64_t first, int64_t count) {
    const Matrix<const T> rows = x.some_rows(first, count);
    const DropMask drop_hidden(layer.hidden_dropout, first, count, wide);
    const DropMask drop_output(layer.output_dropout, kOutputRows + first, count, dim_out);
    T* const u_rows = keep ? u + first * wide : h;
    T* const g_rows = keep ? g + first * wide : nullptr;
    T* const y_rows = y + first * dim_out;
    const T* const residual_rows = residual ? residual + first * dim_out : nullptr;
    const auto gated = [&](int64_t row, int64_t col, Vec v, int n) {
      const int64_t i = row * wide + col;
      v += layer.gate.bias(col, n);
      if (keep) store(g_rows + i, v, n);
      store(h + i, drop_hidden(F::value(v) * load(u_rows + i, n), row, col), n);
    };
    const auto activated = [&](int64_t row, int64_t col, Vec v, int n) {
      const int64_t i = row * wide + col;
      v += layer.in.bias(col, n);
      if (keep) store(u_rows + i, v, n);
      store(h + i, drop_hidden(F::value(v), row, col), n);
    };
    const auto result = [&](int64_t row, int64_t col, Vec v, int n) {
      const int64_t i = row * dim_out + col;
      v = drop_output(v + layer.out.bias(col, n), row, col);
      store(y_rows + i, residual ? v + load(residual_rows + i, n) : v, n);
    };
    const Touched to_u(u_rows, wide), to_g(g_rows, wide), to_h(h, wide);
    const Touched to_y(y_rows, dim_out), from_residual(residual_rows, dim_out);
    if (layer.gate) {
      before_activation(rows, layer.in, u_rows);
      multiply(rows, layer.gate.weight, gated, {to_u, to_g, to_h});
    } else {
      multiply(rows, layer.in.weight, activated, {to_u, to_h});
    }
    multiply(Matrix<const T>(h, count, wide), layer.out.weight, result, {to_y, from_residual});
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
void backward_hidden(const Matrix<const T>& dy, const Matrix<const T>& weight_out, const DropMask& drop,
                     const T* u, const T* g, const Hidden<T>& to) {
  const int64_t wide = to.h.cols;
  const auto epilogue = [&](int64_t row, int64_t col, Vec dh, int n) {
    const int64_t i = row * wide + col;
    const Activated a = F::both(load((g ? g : u) + i, n));
    dh = drop(dh, row, col);
    if (g) {
      const Vec up = load(u + i, n);
      store(to.h.data + i, drop(a.value * up, row, col), n);
      store(to.du.data + i, dh * a.value, n);
      store(to.dg.data + i, dh * up * a.slope, n);
    } else {
      store(to.h.data + i, drop(a.value, row, col), n);
      store(to.du.data + i, dh * a.slope, n);
    }
  };
  const Touched to_h(to.h.data, wide), to_du(to.du.data, wide), to_dg(to.dg.data, wide);
  multiply(dy, weight_out.t(), epilogue, {Touched(u, wide), Touched(g, wide), to_h, to_du, to_dg});
}

// Some rows of dy as dropout of the outputs lets them through; dy itself where there is none.
template <class T>
class Dropped {
 public:
  Dropped(const Matrix<const T>& dy, const Dropout& dropout, int64_t first)
      : own_(dropout ? dy.rows * dy.cols * sizeof(T) : 0),
        rows(dropout ? Matrix<const T>(own_.as<T>(), dy.rows, dy.cols) : dy) {
    if (!dropout) return;
    const DropMask drop(dropout, kOutputRows + first, dy.rows, dy.cols);
    parallel_for(dy.rows, false, [&](int64_t row) {
      for (int64_t col = 0; col < dy.cols; col += W) {
        const int n = static_cast<int>(std::min<int64_t>(W, dy.cols - col));
        store(own_.as<T>() + row * dy.cols + col, drop(load(dy.at(row, col), n), row, col), n);
      }
    });
  }

 private:
  Buffer own_;

 public:
  const Matrix<const T> rows;
};

template <class T, class F>
void backward(const Matrix<const T>& dy, const Matrix<const T>& x, const Layer<T>& layer, const T* u,
              const T* g, const Gradients& to) {
  const int64_t wide = layer.wide(), chunks = std::max<int64_t>(1, ceil_div(x.rows, kChunk));
  Sum<T> weight_in_sum(to.weight_in, chunks), bias_in_sum(to.bias_in, chunks);
  Sum<T> weight_gate_sum(to.weight_gate, chunks), bias_gate_sum(to.bias_gate, chunks);
  Sum<T> weight_out_sum(to.weight_out, chunks), bias_out_sum(to.bias_out, chunks);
  const int64_t again = u ? 0 : std::min(kChunk, x.rows) * wide;  // elements of u and g to make again
  const Buffer own_u(again * sizeof(T)), own_g(layer.gate ? again * sizeof(T) : 0);
  for_chunks(x.rows, [&](int64_t first, int64_t count) {
    const Matrix<const T> x_rows = x.some_rows(first, count);
    const Dropped<T> dropped(dy.some_rows(first, count), layer.output_dropout, first);
    const Matrix<const T>& dy_rows = dropped.rows;
    const T *u_rows = u + first * wide, *g_rows = layer.gate ? g + first * wide : nullptr;
    if (again) {
      before_activation(x_rows, layer.in, own_u.as<T>());
      before_activation(x_rows, layer.gate, own_g.as<T>());
      u_rows = own_u.as<T>();
      g_rows = layer.gate ? own_g.as<T>() : nullptr;
    }
    const Hidden<T> hidden(count, wide, g_rows);
    const Matrix<const T> h = hidden.h, du = hidden.du, dg = hidden.dg;
    const DropMask drop(layer.hidden_dropout, first, count, wide);
    backward_hidden<T, F>(dy_rows, layer.out.weight, drop, u_rows, g_rows, hidden);
    T* const dx = wanted(to.x) ? to.x.as<T>() + first * x.cols : nullptr;
    Sum<T> x_sum(Matrix<T>(dx, count, x.cols), g_rows ? 2 : 1);
    x_sum.add(du, layer.in.weight.t());
    if (g_rows) x_sum.add(dg, layer.gate.weight.t());
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
             Tensor weight_out, Tensor bias_out, Tensor residual, Tensor seed, std::string activation,
             double dropout_p, double output_dropout_p, bool keep, Tensor y, Tensor u, Tensor g) {
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    const Layer<T> layer{{weight_in, bias_in}, {weight_gate, bias_gate}, {weight_out, bias_out},
                         {seed, dropout_p}, {seed, output_dropout_p}};
    with_activation(activation, [&](auto f) {
      forward<T, decltype(f)>(Matrix<const T>(x), layer, keep, residual.as<T>(), y.as<T>(), u.as<T>(),
                              g.as<T>());
    });
  });
}

void ffn_bwd(Tensor dy, Tensor x, Tensor weight_in, Tensor bias_in, Tensor weight_gate, Tensor bias_gate,
             Tensor weight_out, Tensor bias_out, Tensor seed, Tensor u, Tensor g, std::string activation,
             double dropout_p, double output_dropout_p, std::vector<bool>, Tensor dx, Tensor dweight_in,
             Tensor dbias_in, Tensor dweight_gate, Tensor dbias_gate, Tensor dweight_out, Tensor dbias_out) {
  const Gradients to{dx, dweight_in, dbias_in, dweight_gate, dbias_gate, dweight_out, dbias_out};
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    const Layer<T> layer{{weight_in, bias_in}, {weight_gate, bias_gate}, {weight_out, bias_out},
                         {seed, dropout_p}, {seed, output_dropout_p}};
    const T *u_kept = wanted(u) ? u.as<T>() : nullptr, *g_kept = wanted(g) ? g.as<T>() : nullptr;
    with_activation(activation, [&](auto f) {
      backward<T, decltype(f)>(Matrix<const T>(dy), Matrix<const T>(x), layer, u_kept, g_kept, to);
    });
  });
}

KERNEL(ffn_fwd);
KERNEL(ffn_bwd);

}  // namespace llmkern
