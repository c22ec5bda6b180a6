// ffn: y = h W_outᵀ + b_out,  h = f(u) or f(g) ∘ u,  u = x W_inᵀ + b_in,  g = x W_gateᵀ + b_gate
//
// Backward, with dh = dy W_out:
//   du = dh ∘ f'(u),  or with a gate  du = dh ∘ f(g),  dg = dh ∘ u ∘ f'(g)
//   dx = du W_in + dg W_gate,   dW_in = duᵀ x,  dW_gate = dgᵀ x,  dW_out = dyᵀ h,   db = column sums
//
// Rows go through in chunks, so that scratch stays bounded: h in forward; h, du and dg in backward.

#include <string>

#include "activation.h"
#include "gemm.h"

namespace llmkern {
namespace {

constexpr int64_t kChunk = 2048;  // rows; fixed, so that sums over rows do not depend on the thread count

bool wanted(const Tensor& t) { return t.count() > 0; }

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

// Epilogue that adds up the results of several products in float, and rounds the last sum only.
template <class T>
class Sum {
 public:
  Sum(const Matrix<T>& out, int64_t terms)
      : out_(out), terms_(terms), partial_(rounds() && terms > 1 ? out.rows * out.cols * sizeof(float) : 0) {}
  Sum(const Tensor& out, int64_t terms)
      : Sum(Matrix<T>(out.as<T>(), out.dims > 1 ? out.size[0] : 1, out.dims ? out.size[out.dims - 1] : 0), terms) {}

  // The epilogue of the next product.
  auto next() {
    const int64_t term = term_++;
    return [this, term](int64_t row, int64_t col, Vec v, int n) {
      T* out = out_.at(row, col);
      float* partial = rounds() ? partial_.as<float>() + row * out_.cols + col : reinterpret_cast<float*>(out);
      if (term > 0) v += load(partial, n);
      if (term + 1 == terms_)
        store(out, v, n);
      else
        store(partial, v, n);
    };
  }

 private:
  static constexpr bool rounds() { return sizeof(T) < sizeof(float); }
  Matrix<T> out_;
  int64_t terms_, term_ = 0;
  Buffer partial_;
};

template <class T, class Epilogue>
void sum_columns(const Matrix<const T>& m, const Epilogue& epilogue) {
  constexpr int64_t kStrip = 4 * W;
  parallel_for(ceil_div(m.cols, kStrip), false, [&](int64_t strip) {
    const int64_t first = strip * kStrip, last = std::min(m.cols, first + kStrip);
    Vec sums[4] = {};
    for (int64_t row = 0; row < m.rows; ++row)
      for (int64_t j = 0; first + j < last; j += W)
        sums[j / W] += load(m.at(row, first + j), static_cast<int>(std::min<int64_t>(W, last - first - j)));
    for (int64_t j = 0; first + j < last; j += W)
      epilogue(0, first + j, sums[j / W], static_cast<int>(std::min<int64_t>(W, last - first - j)));
  });
}

// Calls body(first, count) for every chunk of rows; once for none at all, so that sums become zeros.
template <class Body>
void for_chunks(int64_t rows, const Body& body) {
  int64_t first = 0;
  do {
    body(first, std::min(kChunk, rows - first));
    first += kChunk;
  } while (first < rows);
}

template <class T, class F>
void forward(const Matrix<const T>& x, const Linear<T>& in, const Linear<T>& gate, const Linear<T>& out, bool keep,
             T* y, T* u, T* g) {
  const int64_t wide = in.weight.rows, dim_out = out.weight.rows;
  const Buffer hidden(std::min(kChunk, x.rows) * wide * sizeof(T));
  T* const h = hidden.as<T>();
  for_chunks(x.rows, [&](int64_t first, int64_t count) {
    const Matrix<const T> rows = x.some_rows(first, count);
    T* const u_rows = keep ? u + first * wide : h;
    T* const g_rows = keep ? g + first * wide : nullptr;
    T* const y_rows = y + first * dim_out;
    if (gate) {
      multiply(rows, in.weight, [&](int64_t row, int64_t col, Vec v, int n) {
        store(u_rows + row * wide + col, v + in.bias(col, n), n);
      });
      multiply(rows, gate.weight, [&](int64_t row, int64_t col, Vec v, int n) {
        const int64_t i = row * wide + col;
        v += gate.bias(col, n);
        if (g_rows) store(g_rows + i, v, n);
        store(h + i, F::value(v) * load(u_rows + i, n), n);
      }, {Reads(u_rows, wide)});
    } else {
      multiply(rows, in.weight, [&](int64_t row, int64_t col, Vec v, int n) {
        const int64_t i = row * wide + col;
        v += in.bias(col, n);
        if (keep) store(u_rows + i, v, n);
        store(h + i, F::value(v), n);
      });
    }
    multiply(Matrix<const T>(h, count, wide), out.weight, [&](int64_t row, int64_t col, Vec v, int n) {
      store(y_rows + row * dim_out + col, v + out.bias(col, n), n);
    });
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
  multiply(dy, weight_out.t(), epilogue, {Reads(u, wide), Reads(g, wide)});
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
    if (wanted(to.x)) {
      Sum<T> sum(Matrix<T>(to.x.as<T>() + first * x.cols, count, x.cols), g ? 2 : 1);
      multiply(du, weight_in.t(), sum.next());
      if (g) multiply(dg, weight_gate.t(), sum.next());
    }
    if (wanted(to.weight_in)) multiply(du.t(), x_rows.t(), weight_in_sum.next());
    if (wanted(to.weight_gate)) multiply(dg.t(), x_rows.t(), weight_gate_sum.next());
    if (wanted(to.weight_out)) multiply(dy_rows.t(), h.t(), weight_out_sum.next());
    if (wanted(to.bias_in)) sum_columns(du, bias_in_sum.next());
    if (wanted(to.bias_gate)) sum_columns(dg, bias_gate_sum.next());
    if (wanted(to.bias_out)) sum_columns(dy_rows, bias_out_sum.next());
  });
}

}  // namespace

void ffn_fwd(Tensor x, Tensor weight_in, Tensor bias_in, Tensor weight_gate, Tensor bias_gate, Tensor weight_out,
             Tensor bias_out, std::string activation, bool keep, Tensor y, Tensor u, Tensor g) {
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    const Linear<T> in(weight_in, bias_in), gate(weight_gate, bias_gate), out(weight_out, bias_out);
    with_activation(activation, [&](auto f) {
      forward<T, decltype(f)>(Matrix<const T>(x), in, gate, out, keep, y.as<T>(), u.as<T>(), g.as<T>());
    });
  });
}

void ffn_bwd(Tensor dy, Tensor x, Tensor weight_in, Tensor, Tensor weight_gate, Tensor, Tensor weight_out, Tensor,
             Tensor u, Tensor g, std::string activation, std::vector<bool>, Tensor dx, Tensor dweight_in,
             Tensor dbias_in, Tensor dweight_gate, Tensor dbias_gate, Tensor dweight_out, Tensor dbias_out) {
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
