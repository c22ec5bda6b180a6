// Attention backward, block by block (Dao 2023, FlashAttention-2, algorithm 2).  With S as in forward:
//   P = e^(S - lse),  dP = Z ∘ dout vᵀ,  dS = P ∘ (dP - delta),  delta = rowsum(dout ∘ out) - dlse
//   dv = (Z ∘ P)ᵀ dout,  dk = scale · dSᵀ q,  dq = scale · dS k
// with the factors Z of dropout; dS also has the derivative of softcap.  A sink's gradient is that of a
// score with dP = 0:  dsink = -Σ e^(sink - lse) delta.
//
// A task is a chunk of the keys of one key head: it goes over these keys block by block, and over the
// queries that see each block, so dk and dv are its own.  Where a head's keys are cut into several
// chunks, to have tasks enough for many threads, each chunk sums a dq of its own and a second pass adds
// them in order.  The cut depends on the shapes alone: the same bits for any number of threads.

#include "attention.h"

namespace llmkern {
namespace attn {
namespace {

constexpr int64_t kTasks = 32;     // wanted at least
constexpr int64_t kMostChunks = 4; // of a head: bounds the memory of partial dq

struct Tensors {
  const Tensor &dout, &dlse, &q, &k, &v, &out, &lse, &dq, &dk, &dv, &dsinks;
};

// rowsum(dout ∘ out) - dlse for one query
template <class T>
float delta_of(const Tensors& t, int64_t b, int64_t h, int64_t query, const T* dout, const T* out,
               int64_t dim) {
  Vec total{};
  for (int64_t d = 0; d < dim; d += W) {
    const int n = static_cast<int>(std::min<int64_t>(W, dim - d));
    total = fma(load(dout + d, n), load(out + d, n), total);
  }
  const int64_t* strides = t.dlse.stride;
  return sum(total) -
         (t.dlse ? t.dlse.as<float>()[b * strides[0] + h * strides[1] + query * strides[2]] : 0.0f);
}

// Queries first .. last - 1 of one head, packed for the five products, in blocks; `first` starts one.
template <class T>
class PackedQueries {
 public:
  static int64_t floats(const Problem& p, int64_t first, int64_t last) {
    const int64_t blocks = ceil_div(last - first, kQueries);
    return blocks * (tile_size(p.dim) + tile_size(p.value_dim) + panel_size_of(p.dim) +
                     panel_size_of(p.value_dim)) + 2 * blocks * kQueries;
  }
  PackedQueries(const Problem& p, int64_t first, int64_t last, Scratch& scratch)
      : p_(p), first_(first), last_(last), dims_{p.dim, p.value_dim} {
    const int64_t blocks = ceil_div(last - first, kQueries);
    for (int i = 0; i < 2; ++i) {
      tiles_[i] = scratch.take(blocks * tile_size(dims_[i]));
      panels_[i] = scratch.take(blocks * panel_size_of(dims_[i]));
    }
    lse_ = scratch.take(blocks * kQueries);
    delta_ = scratch.take(blocks * kQueries);
  }

  void pack(const Tensors& t, int64_t b, int64_t h) {
    const Matrix<const T> matrices[2] = {head_of<const T>(t.q, b, h), head_of<const T>(t.dout, b, h)};
    const auto out = head_of<const T>(t.out, b, h);
    for (int64_t row = first_; row < last_; row += kQueries) {
      const int64_t n = std::min<int64_t>(kQueries, last_ - row), block = block_of(row);
      for (int i = 0; i < 2; ++i) {
        const auto rows = matrices[i].some_rows(row, n);
        pack_panels<W>(rows, tiles_[i] + block * tile_size(dims_[i]));
        pack_panels<kPanel>(rows.t(), panels_[i] + block * panel_size_of(dims_[i]));
      }
    }
    const float* lse = t.lse.as<float>() + p_.row(b, h, 0);
    for (int64_t i = first_; i < last_; ++i) {
      lse_[i - first_] = lse[i] == -kInfinity ? 0 : lse[i];  // no key: e^(-inf - 0) = 0
      delta_[i - first_] = delta_of(t, b, h, i, matrices[1].at(i, 0), out.at(i, 0), p_.value_dim);
    }
  }

  // as left operands, over the head dim
  const float* q_tiles(int64_t row) const { return tiles_[0] + block_of(row) * tile_size(dims_[0]); }
  const float* dout_tiles(int64_t row) const { return tiles_[1] + block_of(row) * tile_size(dims_[1]); }
  // as right operands, over the queries
  const float* q_panels(int64_t row) const { return panels_[0] + block_of(row) * panel_size_of(dims_[0]); }
  const float* dout_panels(int64_t row) const { return panels_[1] + block_of(row) * panel_size_of(dims_[1]); }
  const float* lse(int64_t row) const { return lse_ + row - first_; }
  const float* delta(int64_t row) const { return delta_ + row - first_; }

 private:
  static int64_t tile_size(int64_t dim) { return packed_size<W, T>(kQueries, dim); }
  static int64_t panel_size_of(int64_t dim) { return packed_size<kPanel, T>(dim, kQueries); }
  int64_t block_of(int64_t row) const { return (row - first_) / kQueries; }

  const Problem& p_;
  const int64_t first_, last_, dims_[2];
  float *tiles_[2], *panels_[2], *lse_, *delta_;
};

// One block of keys, packed for the products.
template <class T>
class PackedKeys {
 public:
  static int64_t floats(const Problem& p) {
    return packed_size<kPanel, T>(kKeys, p.dim) + packed_size<kPanel, T>(kKeys, p.value_dim) +
           packed_size<kPanel, T>(p.dim, kKeys);
  }
  PackedKeys(const Problem& p, Scratch& scratch)
      : k_columns(scratch.take(packed_size<kPanel, T>(kKeys, p.dim))),
        v_columns(scratch.take(packed_size<kPanel, T>(kKeys, p.value_dim))),
        k_rows(scratch.take(packed_size<kPanel, T>(p.dim, kKeys))) {}
  void pack(const Matrix<const T>& k, const Matrix<const T>& v) {
    pack_panels<kPanel>(k, k_columns);
    pack_panels<kPanel>(v, v_columns);
    pack_panels<kPanel>(k.t(), k_rows);
  }
  float *const k_columns, *const v_columns, *const k_rows;
};

// A task: keys first .. last - 1 of one key head, and the blocks of queries that see them.
template <class T>
class Chunk {
 public:
  Chunk(const Problem& p, const Tensors& t, int64_t b, int64_t kv_head, int64_t first, int64_t last)
      : p_(p), t_(t), b_(b), kv_head_(kv_head), first_(first), last_(last),
        first_row_(p.first_query(b, first) / kQueries * kQueries),
        last_row_(std::max(first_row_, std::min(p.s_q, round_up(p.end_query(b, last - 1), kQueries)))),
        keys_(round_up(last - first, kKeys)),
        scratch_(keys_ * (p.width + p.value_width) + dq_floats(p) + 4 * kQueries * kPitch +
                 PackedQueries<T>::floats(p, first_row_, last_row_) + PackedKeys<T>::floats(p)),
        dk_(scratch_.take(keys_ * p.width)), dv_(scratch_.take(keys_ * p.value_width)),
        own_dq_(scratch_.take(dq_floats(p))),
        p_block_(scratch_.take(kQueries * kPitch)), ds_block_(scratch_.take(kQueries * kPitch)),
        ds_rows_(scratch_.take(kQueries * kPitch)), slopes_(scratch_.take(kQueries * kPitch)),
        queries_(p, first_row_, last_row_, scratch_), packed_keys_(p, scratch_) {}

  static int64_t dq_floats(const Problem& p) { return round_up(p.s_q, kQueries) * p.width; }

  // `partial_dq`: where to leave dq of the group's heads as floats; null if this chunk has all the keys.
  void run(float* partial_dq) {
    std::fill_n(dk_, keys_ * p_.width, 0.0f);
    std::fill_n(dv_, keys_ * p_.value_width, 0.0f);
    for (int64_t h = kv_head_ * p_.group; h < (kv_head_ + 1) * p_.group; ++h) {
      dq_ = partial_dq ? partial_dq + h % p_.group * dq_floats(p_) : own_dq_;
      // the first chunk has the rows too that see no key at all
      std::fill(dq_ + (first_ ? first_row_ * p_.width : 0), dq_ + dq_floats(p_), 0.0f);
      add_head(h);
      if (t_.dq.count() && !partial_dq) write(dq_, p_.width, t_.dq, h, 0, p_.s_q, p_.scale);
    }
    if (t_.dk.count()) write(dk_, p_.width, t_.dk, kv_head_, first_, last_ - first_, p_.scale);
    if (t_.dv.count()) write(dv_, p_.value_width, t_.dv, kv_head_, first_, last_ - first_, 1);
  }

 private:
  void add_head(int64_t h) {
    queries_.pack(t_, b_, h);
    const auto k = head_of<const T>(t_.k, b_, kv_head_), v = head_of<const T>(t_.v, b_, kv_head_);
    for (int64_t key = first_; key < last_; key += kKeys) {
      const int64_t n = std::min<int64_t>(kKeys, last_ - key), end = p_.end_query(b_, key + n - 1);
      packed_keys_.pack(k.some_rows(key, n), v.some_rows(key, n));
      for (int64_t row = p_.first_query(b_, key) / kQueries * kQueries; row < end; row += kQueries)
        add_block(h, Block(p_, b_, row, last_row_, key, last_));
    }
  }

  void add_block(int64_t h, const Block& block) {
    const int64_t row = block.row;
    multiply_scores<T>(block, p_.dim, queries_.q_tiles(row), packed_keys_.k_columns, p_.scale, p_block_);
    multiply_scores<T>(block, p_.value_dim, queries_.dout_tiles(row), packed_keys_.v_columns, 1.0f, ds_block_);
    block.finish(p_, h, p_block_, slopes_);
    if (p_.softcap > 0 || p_.dropout)
      for (int i = 0; i < block.rows; i += 2) differentiate<true>(block, h, i);
    else
      for (int i = 0; i < block.rows; i += 2) differentiate<false>(block, h, i);
    const auto into = [](float* to, int64_t width) {
      return [=](int i, int64_t d, Vec sums) { store(to + i * width + d, load(to + i * width + d) + sums); };
    };
    const int64_t at = block.key - first_, width = p_.width, value_width = p_.value_width;
    if (t_.dv.count())
      multiply_columns<T>(block, p_block_, queries_.dout_panels(row), value_width,
                          into(dv_ + at * value_width, value_width));
    if (t_.dk.count())
      multiply_columns<T>(block, ds_block_, queries_.q_panels(row), width, into(dk_ + at * width, width));
    if (t_.dq.count())
      multiply_rows<T>(block, pairs ? ds_rows_ : ds_block_, packed_keys_.k_rows, width,
                       into(dq_ + row * width, width));
  }

  // Rows i and i + 1 of S and dP into Z ∘ P and dS, in place and as the products want their units.
  // `bent`: there are dropout or softcap.
  template <bool bent>
  void differentiate(const Block& block, int64_t h, int i) {
    const bool two = i + 1 < block.rows;
    float *p0 = p_block_ + i * kPitch, *ds0 = ds_block_ + i * kPitch, *rows = ds_rows_ + i * kPitch;
    const float *lse = queries_.lse(block.row + i), *delta = queries_.delta(block.row + i);
    alignas(64) float kept[2][kKeys];
    if constexpr (bent)
      for (int r = 0; r < 1 + two; ++r) kept_of(block, h, i + r, kept[r]);
    const auto p_of = [&](int r, int j) { return probability<T>(load(p0 + r * kPitch + j), set(lse[r])); };
    const auto score_gradient = [&](int r, int j, Vec p) {
      const Vec dp = load(ds0 + r * kPitch + j);
      if constexpr (bent) {
        const Vec ds = p * (dp * load(kept[r] + j) - delta[r]);
        return p_.softcap > 0 ? ds * load(slopes_ + (i + r) * kPitch + j) : ds;
      }
      return p * (dp - delta[r]);
    };
    for (int j = 0; j < block.part_of(i); j += W) {
      Vec p_a = p_of(0, j), p_b = two ? p_of(1, j) : Vec{};
      const Vec ds_a = score_gradient(0, j, p_a), ds_b = two ? score_gradient(1, j, p_b) : Vec{};
      if constexpr (bent) {
        p_a *= load(kept[0] + j);
        if (two) p_b *= load(kept[1] + j);
      }
      if constexpr (pairs) {
        store(p0 + j, round_to_zipped_pairs(p_a, p_b));
        store(ds0 + j, round_to_zipped_pairs(ds_a, ds_b));
        store_halves(rows + j / 2, round_to_pairs(ds_a, ds_b), rows + kPitch + j / 2);
      } else {
        store(p0 + j, p_a);
        store(ds0 + j, ds_a);
        if (two) {
          store(p0 + kPitch + j, p_b);
          store(ds0 + kPitch + j, ds_b);
        }
      }
    }
  }

  // The factors of dropout for a row of the block.
  void kept_of(const Block& block, int64_t h, int i, float* kept) const {
    if (!p_.dropout) {
      std::fill_n(kept, kKeys, 1.0f);
      return;
    }
    for (int j = 0; j < block.part_of(i); j += Dropout::kGroup)
      p_.dropout.factors(p_.row(b_, h, block.row + i), block.key + j, kept + j);
  }

  static void store_halves(float* first, Vec x, float* second) {
    std::memcpy(first, &x, sizeof x / 2);
    std::memcpy(second, reinterpret_cast<const char*>(&x) + sizeof x / 2, sizeof x / 2);
  }

  void write(const float* from, int64_t width, const Tensor& to, int64_t h, int64_t row, int64_t rows,
             float factor) const {
    const auto to_rows = head_of<T>(to, b_, h).some_rows(row, rows);
    write_rows(from, rows, width, to_rows, [=](int64_t) { return factor; });
  }

  static constexpr bool pairs = Units<T>::depth == 2;
  const Problem& p_;
  const Tensors& t_;
  const int64_t b_, kv_head_, first_, last_, first_row_, last_row_, keys_;
  Scratch scratch_;
  float *const dk_, *const dv_, *const own_dq_, *const p_block_, *const ds_block_, *const ds_rows_,
      *const slopes_;
  PackedQueries<T> queries_;
  PackedKeys<T> packed_keys_;
  float* dq_ = nullptr;
};

// dq of all heads from the partial sums of their chunks, (chunks, batch · heads, rows of dq).
template <class T>
void add_partial(const Problem& p, float* partial, int64_t chunk, int64_t chunks, const Tensor& dq) {
  const int64_t size = Chunk<T>::dq_floats(p), blocks = ceil_div(p.s_q, kQueries), heads = p.batch * p.heads;
  parallel_for(heads * blocks, false, [&](int64_t task) {
    const int64_t head = task / blocks, row = task % blocks * kQueries;
    const int64_t n = std::min<int64_t>(kQueries, p.s_q - row);
    float* total = partial + head * size + row * p.width;
    for (int64_t c = 1; c < chunks; ++c) {
      if (p.first_query(head / p.heads, c * chunk) / kQueries * kQueries > row) break;  // sees none of these keys
      const float* part = total + c * heads * size;
      for (int64_t i = 0; i < n * p.width; i += W) store(total + i, load(total + i) + load(part + i));
    }
    const auto to = head_of<T>(dq, head / p.heads, head % p.heads).some_rows(row, n);
    write_rows(total, n, p.width, to, [&](int64_t) { return p.scale; });
  });
}

// dsink = -Σ e^(sink - lse) delta over the queries of a head in all sequences, in order.
template <class T>
void sink_gradients(const Problem& p, const Tensors& t) {
  parallel_for(p.heads, false, [&](int64_t h) {
    double total = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const auto dout = head_of<const T>(t.dout, b, h), out = head_of<const T>(t.out, b, h);
      const float* lse = t.lse.as<float>() + p.row(b, h, 0);
      for (int64_t i = 0; i < p.s_q; ++i)
        total += std::exp(p.sink(h) - lse[i]) *
                 delta_of(t, b, h, i, dout.at(i, 0), out.at(i, 0), p.value_dim);
    }
    t.dsinks.as<float>()[h] = static_cast<float>(-total);
  });
}

template <class T>
void backward(const Problem& p, const Tensors& t) {
  if (t.dsinks.count()) sink_gradients<T>(p, t);
  if (!t.dq.count() && !t.dk.count() && !t.dv.count()) return;
  const int64_t groups = p.batch * p.kv_heads, blocks = ceil_div(p.s_k, kKeys);
  const int64_t cut = std::clamp<int64_t>(ceil_div(kTasks, std::max<int64_t>(1, groups)), 1, kMostChunks);
  const int64_t chunk = std::max<int64_t>(1, ceil_div(blocks, cut)) * kKeys;
  const int64_t chunks = std::max<int64_t>(1, ceil_div(p.s_k, chunk)), dq_floats = Chunk<T>::dq_floats(p);
  const bool split = chunks > 1 && t.dq.count();
  const Buffer partial((split ? chunks * p.batch * p.heads * dq_floats : 0) * sizeof(float));
  // the first keys are seen by most queries: they start first
  parallel_for(groups * chunks, true, [&](int64_t task) {
    const int64_t c = task / groups, group = task % groups;
    float* dq = partial.as<float>() + (c * groups + group) * p.group * dq_floats;
    Chunk<T>(p, t, group / p.kv_heads, group % p.kv_heads, c * chunk, std::min((c + 1) * chunk, p.s_k))
        .run(split ? dq : nullptr);
  });
  if (split) add_partial<T>(p, partial.as<float>(), chunk, chunks, t.dq);
}

}  // namespace
}  // namespace attn

void attention_bwd(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor mask, Tensor alibi_slopes,
                   Tensor sinks, Tensor spans, Tensor seed, int64_t diagonal, OptionalInt left,
                   OptionalInt right, double scale, double softcap, double dropout_p, Tensor out, Tensor lse,
                   std::vector<bool>, Tensor dq, Tensor dk, Tensor dv, Tensor, Tensor dsinks) {
  const attn::Problem problem(q, k, v, {mask, alibi_slopes, sinks, spans, seed, diagonal, left, right, scale,
                                        softcap, dropout_p});
  const attn::Tensors tensors{dout, dlse, q, k, v, out, lse, dq, dk, dv, dsinks};
  with_type(q.dtype, [&](auto t) { attn::backward<decltype(t)>(problem, tensors); });
}

KERNEL(attention_bwd);

}  // namespace llmkern
