// A whole step of generation in one call: every layer of a GPT or Llama for one new token of each sequence.
//
// What a step costs beside the bytes of its weights is waiting: of Python for 10 ops a layer, of threads for each
// other at the beginning and end of each op.  Here one parallel region runs all layers; threads share
// out rows of weights and heads, meet at four barriers a layer, and each computes for itself what is cheaper
// than to wait for (norms, digits of x).  A sum belongs to one thread: the same bits for any number of them.

#include <map>
#include <mutex>

#include "activation.h"
#include "decode_tasks.h"
#include "gemv.h"

namespace llmkern {
namespace {

using Vector = std::vector<float>;  // a bias or a norm's weight, padded by W; empty: absent

Vector as_vector(const Tensor& t) {
  Vector v;
  if (!t) return v;
  v.resize(t.size[0] + W, 0.0f);
  with_type(t.dtype, [&](auto type) {
    for (int64_t i = 0; i < t.size[0]; ++i) v[i] = to_float(t.as<decltype(type)>()[i * t.stride[0]]);
  });
  return v;
}

struct Linear {
  std::unique_ptr<Gemv> weight;
  Vector bias;

  Linear() = default;
  Linear(const Tensor* t, Arena& arena) : bias(as_vector(t[3])) {
    if (t[0]) weight = make_gemv(t[0], t[1], t[2], arena);
  }
  explicit operator bool() const { return weight != nullptr; }
  int64_t rows() const { return weight->rows; }
  // sums[m] of tile `tile` for each row of x, with the bias
  void tile(const Activations& x, int64_t tile, Vec* sums) const {
    weight->multiply(x, tile, sums);
    for (int64_t m = 0; !bias.empty() && m < x.rows; ++m) sums[m] += load(bias.data() + tile * W);
  }
};

struct Norm {
  Vector weight, bias;
  bool centered = false;  // LayerNorm, else RMSNorm
  float eps = 0;

  void operator()(const float* x, int64_t width, float* y) const {
    const auto mean = [&](const auto& f) {
      Vec total{};
      for (int64_t i = 0; i < width; i += W) total += keep_first(f(load(x + i, left(i, width))), left(i, width), 0);
      return sum(total) / width;
    };
    const float m = centered ? mean([](Vec v) { return v; }) : 0.0f;
    const float rstd = 1 / std::sqrt(mean([&](Vec v) { return (v - m) * (v - m); }) + eps);
    for (int64_t i = 0; i < width; i += W) {
      Vec v = (load(x + i, left(i, width)) - m) * rstd;
      if (!weight.empty()) v *= load(weight.data() + i);
      if (!bias.empty()) v += load(bias.data() + i);
      store(y + i, v, left(i, width));
    }
  }
  static int left(int64_t i, int64_t width) { return static_cast<int>(std::min<int64_t>(W, width - i)); }
};

struct Layer {
  Norm before_attention, before_mlp, q_norm, k_norm;
  Linear q, k, v, out, gate, up, down;
};

// Of all layers: k, v (L, B or pages, H_kv, S, D), their scales without D, and where pages are.
struct Caches {
  Tensor k, v, k_scale, v_scale, table;

  static Tensor of_layer(Tensor all, int64_t layer) {
    if (!all) return all;
    with_bytes(all.dtype, [&](auto t) { all.data = all.as<decltype(t)>() + layer * all.stride[0]; });
    --all.dims;
    std::copy_n(all.size + 1, all.dims, all.size), std::copy_n(all.stride + 1, all.dims, all.stride);
    return all;
  }
  decode::Cache keys(int64_t layer) const { return {of_layer(k, layer), of_layer(k_scale, layer), table}; }
  decode::Cache values(int64_t layer) const { return {of_layer(v, layer), of_layer(v_scale, layer), table}; }

 private:
  template <class Body>
  static void with_bytes(DType dtype, const Body& body) {
    dtype == DType::i8 ? body(int8_t{}) : with_type(dtype, body);
  }
};

struct Decoder {
  int64_t heads, kv_heads, dim;  // of a head
  std::string activation;
  OptionalInt left;  // positions that a query sees before its own
  Tensor embedding, positions, cos, sin;
  Arena codes;
  std::vector<Layer> layers;
  Norm last;
  Linear head;

  int64_t width() const { return embedding.size[1]; }
  void step(const Tensor& tokens, const Tensor& lengths, const Caches& caches, const Tensor& logits) const;

 private:
  struct Shared;
  template <class C>
  void run(const Tensor& tokens, const Tensor& lengths, const Caches& caches, const Tensor& logits) const;
  template <class A>
  void mlp(const Team& team, const Layer& layer, Shared& s, Activations& in, Activations& wide) const;
  void embed(const Team& team, const Tensor& tokens, const Tensor& lengths, float* x) const;
};

// What the threads of a step write for each other, rows of floats.
struct Decoder::Shared {
  const int64_t rows, width, heads, kv_heads, dim, hidden;
  const int64_t qkv_width = (heads + 2 * kv_heads) * dim;
  Buffer buffer;
  float *x, *qkv, *attended, *h;

  Shared(const Decoder& d, int64_t rows)
      : rows(rows), width(d.width()), heads(d.heads), kv_heads(d.kv_heads), dim(d.dim), hidden(d.layers[0].up.rows()),
        buffer(rows * (width + qkv_width + heads * dim + hidden + 4 * W) * sizeof(float)) {
    x = buffer.as<float>();
    qkv = x + rows * width, attended = qkv + rows * qkv_width, h = attended + rows * heads * dim;
  }
  // (B, count, 1, D) inside rows of `stride` elements
  Tensor head_view(float* data, int64_t count, int64_t stride) const {
    Tensor t;
    t.data = data, t.dtype = DType::f32, t.dims = 4;
    const int64_t size[] = {rows, count, 1, dim}, strides[] = {stride, dim, stride, 1};
    std::copy_n(size, 4, t.size), std::copy_n(strides, 4, t.stride);
    return t;
  }
};

int width_of(int64_t tile, int64_t rows) { return static_cast<int>(std::min<int64_t>(W, rows - tile * W)); }

// Before a wait: asks for the beginning of this thread's part of what comes behind it.
void ask(const Team& team, const Linear& l) {
  if (l) l.weight->ask(team.share(l.weight->tiles()).begin);
}

// put(m, col, values, n) with this thread's part of l(x).
template <class Put>
void product(const Team& team, const Linear& l, const Activations& x, const Put& put) {
  const Range tiles = team.share(l.weight->tiles());
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    Vec sums[kMostRows];
    l.tile(x, tile, sums);
    for (int64_t m = 0; m < x.rows; ++m) put(m, tile * W, sums[m], width_of(tile, l.rows()));
  }
}

void read(const float* from, int64_t width, Activations& to) {
  for (int64_t m = 0; m < to.rows; ++m) std::copy_n(from + m * width, width, to.row(m));
  to.digitise();
}

void Decoder::embed(const Team& team, const Tensor& tokens, const Tensor& lengths, float* x) const {
  const Range part = team.share((width() + W - 1) / W);
  for (int64_t b = 0; b < tokens.size[0]; ++b)
    for (int64_t i = part.begin * W; i < std::min(part.end * W, width()); i += W) {
      const int n = Norm::left(i, width());
      const auto row = [&](const Tensor& table, int64_t at) {
        Vec v;
        with_type(table.dtype, [&](auto t) { v = load(table.as<decltype(t)>() + at * table.stride[0] + i, n); });
        return v;
      };
      Vec v = row(embedding, tokens.as<int64_t>()[b]);
      if (positions) v += row(positions, lengths.as<int32_t>()[b]);
      store(x + b * width() + i, v, n);
    }
}

template <class A>
void Decoder::mlp(const Team& team, const Layer& layer, Shared& s, Activations& in, Activations& wide) const {
  const Range tiles = team.share(layer.up.weight->tiles());
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    Vec up[kMostRows], gate[kMostRows];
    layer.up.tile(in, tile, up);
    if (layer.gate) layer.gate.tile(in, tile, gate);
    for (int64_t m = 0; m < s.rows; ++m)
      store(s.h + m * s.hidden + tile * W, layer.gate ? A::value(gate[m]) * up[m] : A::value(up[m]),
            width_of(tile, s.hidden));
  }
  ask(team, layer.down);
  team.barrier();
  read(s.h, s.hidden, wide);
}

template <class C>
void Decoder::run(const Tensor& tokens, const Tensor& lengths, const Caches& caches, const Tensor& logits) const {
  const int64_t rows = tokens.size[0];
  Shared s(*this, rows);
  const int64_t q_width = heads * dim, kv_width = kv_heads * dim, group = heads / kv_heads;
  std::vector<decode::Problem> problems;
  for (size_t i = 0; i < layers.size(); ++i)
    problems.push_back(decode::Problem{
        s.head_view(s.qkv, heads, s.qkv_width), s.head_view(s.qkv + q_width, kv_heads, s.qkv_width),
        s.head_view(s.qkv + q_width + kv_width, kv_heads, s.qkv_width), lengths, cos, sin, {}, {},
        caches.keys(i), caches.values(i), rows, heads, kv_heads, group, 1, dim, decode::ceil_div(dim, 2 * W) * 2 * W, group, false, 1 / std::sqrt(static_cast<float>(dim)), 0.0f,
        left});
  problems[0].check();
  const decode::Tasks<C> tasks(problems[0]);
  const Tensor attended = s.head_view(s.attended, heads, q_width);
  Buffer lse_buffer(rows * heads * sizeof(float));
  Tensor lse;
  lse.data = lse_buffer.as<float>();

  together([&](const Team& team) {
    Activations in(rows, width()), attended_in(rows, q_width), wide(rows, s.hidden);
    const auto normed = [&](const Norm& norm) {
      for (int64_t m = 0; m < rows; ++m) norm(s.x + m * width(), width(), in.row(m));
      in.digitise();
    };
    const auto add_to_x = [&](int64_t m, int64_t col, Vec y, int n) {
      float* to = s.x + m * width() + col;
      store(to, load(to, n) + y, n);
    };
    ask(team, layers[0].q);
    embed(team, tokens, lengths, s.x);
    team.barrier();
    for (size_t i = 0; i < layers.size(); ++i) {
      const Layer& layer = layers[i];
      normed(layer.before_attention);
      int64_t first = 0;
      for (const Linear* l : {&layer.q, &layer.k, &layer.v}) {
        product(team, *l, in, [&](int64_t m, int64_t col, Vec y, int n) { store(s.qkv + m * s.qkv_width + first + col, y, n); });
        first += l->rows();
      }
      ask(team, layer.out);
      team.barrier();
      if (!layer.q_norm.weight.empty()) {
        const Range part = team.share(rows * (heads + kv_heads));
        for (int64_t j = part.begin; j < part.end; ++j) {
          const int64_t h = j % (heads + kv_heads);
          float* row = s.qkv + j / (heads + kv_heads) * s.qkv_width + h * dim;
          (h < heads ? layer.q_norm : layer.k_norm)(row, dim, row);
        }
        team.barrier();
      }
      const Range chunks = team.share(tasks.chunks()), merges = team.share(tasks.merges());
      for (int64_t task = chunks.begin; task < chunks.end; ++task) tasks.run(problems[i], task);
      if (tasks.chunks() > tasks.merges()) team.barrier();  // else each merges its own
      for (int64_t task = merges.begin; task < merges.end; ++task) tasks.merge(problems[i], task, attended, lse);
      team.barrier();
      read(s.attended, q_width, attended_in);
      product(team, layer.out, attended_in, add_to_x);
      ask(team, layer.up), ask(team, layer.gate);
      team.barrier();
      normed(layer.before_mlp);
      with_activation(activation, [&](auto a) { mlp<decltype(a)>(team, layer, s, in, wide); });
      product(team, layer.down, wide, add_to_x);
      ask(team, i + 1 < layers.size() ? layers[i + 1].q : head);
      team.barrier();
    }
    normed(last);
    product(team, head, in, [&](int64_t m, int64_t col, Vec y, int n) {
      store(logits.as<float>() + m * logits.stride[0] + col, y, n);
    });
  });
}

void Decoder::step(const Tensor& tokens, const Tensor& lengths, const Caches& caches, const Tensor& logits) const {
  const auto check = [](const char* what, int64_t i, const Tensor& table) {
    if (i < 0 || i >= table.size[0])
      throw std::invalid_argument(std::string("decoder_step: ") + what + " " + std::to_string(i) +
                                  " is out of range, expected 0 to " + std::to_string(table.size[0] - 1));
  };
  for (int64_t b = 0; b < tokens.size[0]; ++b) {
    check("token", tokens.as<int64_t>()[b], embedding);
    if (positions) check("position", lengths.as<int32_t>()[b], positions);
  }
  if (caches.k.dtype == DType::i8) return run<int8_t>(tokens, lengths, caches, logits);
  with_type(caches.k.dtype, [&](auto t) { run<decltype(t)>(tokens, lengths, caches, logits); });
}

// The decoders that Python holds by number.
class Registry {
 public:
  static Registry& shared() {
    static Registry r;
    return r;
  }
  int64_t add(std::shared_ptr<const Decoder> d) {
    const std::lock_guard<std::mutex> lock(mutex_);
    all_[++last_] = std::move(d);
    return last_;
  }
  std::shared_ptr<const Decoder> find(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto it = all_.find(number);
    if (it == all_.end()) throw std::invalid_argument("decoder_step: there is no decoder " + std::to_string(number));
    return it->second;
  }
  void remove(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    all_.erase(number);
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<const Decoder>> all_;
  int64_t last_ = 0;
};

constexpr int kLayerTensors = 36;  // 4 norms of 2, 7 linears of 4

}  // namespace

// A decoder of these weights; its number goes to `handle`, int64.  `layers` has for each layer weight and bias
// of its norms (before attention and MLP, of q and k) and then weight, scales, mins and bias of its linears (q, k, v,
// out, gate, up, down); `last` those of the last norm and of the head.  What is absent is None.
void decoder_make(Tensor handle, Tensor embedding, Tensor positions, Tensor cos, Tensor sin,
                  std::vector<Tensor> layers, std::vector<Tensor> last, int64_t heads, int64_t kv_heads,
                  int64_t dim, bool centered, double eps, std::string activation, OptionalInt left) {
  auto d = std::make_shared<Decoder>();
  d->heads = heads, d->kv_heads = kv_heads, d->dim = dim, d->activation = activation, d->left = left;
  d->embedding = embedding, d->positions = positions, d->cos = cos, d->sin = sin;
  const auto norm = [&](const Tensor* t) {
    return Norm{as_vector(t[0]), as_vector(t[1]), centered, static_cast<float>(eps)};
  };
  const auto linear = [&](const Tensor* t) { return Linear(t, d->codes); };
  for (size_t i = 0; i < layers.size(); i += kLayerTensors) {
    const Tensor *t = layers.data() + i, *l = t + 8;
    d->layers.push_back({norm(t), norm(t + 2), norm(t + 4), norm(t + 6), linear(l), linear(l + 4), linear(l + 8),
                         linear(l + 12), linear(l + 16), linear(l + 20), linear(l + 24)});
  }
  d->last = norm(last.data());
  d->head = linear(last.data() + 2);
  handle.as<int64_t>()[0] = Registry::shared().add(std::move(d));
}

void decoder_free(int64_t handle) { Registry::shared().remove(handle); }

// Logits (B, V) float32 of the tokens after `tokens`, (B,) int64, which follow the `lengths`, (B,) int32, tokens
// in the caches k and v, (L, B, H_kv, S, D), and join them.
void decoder_step(int64_t handle, Tensor tokens, Tensor lengths, Tensor k, Tensor v, Tensor k_scale, Tensor v_scale,
                  Tensor block_table, Tensor logits) {
  Registry::shared().find(handle)->step(tokens, lengths, {k, v, k_scale, v_scale, block_table}, logits);
}

KERNEL(decoder_make);
KERNEL(decoder_free);
KERNEL(decoder_step);

}  // namespace llmkern
