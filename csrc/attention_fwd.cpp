// Attention forward: out = softmax(scale · q kᵀ + mask) v without the scores in memory.
//
// A task is a chunk of queries of the heads that share a key head.  It packs the keys and values that
// these see, once, and goes over them block by block with a running maximum m and sum l for each query
// (Dao 2023, FlashAttention-2, algorithm 1):
//   m' = max(m, rowmax(S)),  P = e^(S - m'),  l' = l e^(m - m') + rowsum(P),  O' = O e^(m - m') + P V
// and at the end out = O / l, lse = m + log l.  Every query's arithmetic is the same in any chunk.

#include "attention.h"

namespace llmkern {
namespace attn {
namespace {

// One block of queries of one head and its running results.
template <class T>
class Queries {
 public:
  static int64_t floats(const Problem& p) {
    return packed_size<W, T>(kQueries, p.dim) + kQueries * (p.value_width + kPitch + W + 3);
  }
  Queries(const Problem& p, Scratch& scratch)
      : p_(p), left_(scratch.take(packed_size<W, T>(kQueries, p.dim))),
        scores_(scratch.take(kQueries * kPitch)), out_(scratch.take(kQueries * p.value_width)),
        sums_(scratch.take(kQueries * W)), top_(scratch.take(kQueries)), base_(scratch.take(kQueries)),
        keep_(scratch.take(kQueries)) {}

  // A sink is a key that the sum has before all others, with a value of 0.
  void start(int64_t h, const Matrix<const T>& queries) {
    h_ = h;
    pack_panels<W>(queries, left_);
    std::fill_n(out_, kQueries * p_.value_width, 0.0f);
    std::fill_n(sums_, kQueries * W, 0.0f);
    std::fill_n(top_, kQueries, p_.has_sinks() ? p_.sink(h) : -kInfinity);
    if (p_.has_sinks())
      for (int i = 0; i < kQueries; ++i) sums_[i * W] = 1;
  }

  void add(const Block& block, const float* keys, const float* values) {
    multiply_scores<T>(block, p_.dim, left_, keys, p_.scale, scores_);
    block.finish(p_, h_, scores_);
    for (int i = 0; i < block.rows; i += W) new_maximum(block, i);
    for (int i = 0; i < block.rows; ++i)
      if (block.part_of(i)) exponentials(block, i);
    multiply_rows<T>(block, scores_, values, p_.value_width, [&](int i, int64_t d, Vec sums) {
      float* to = out_ + i * p_.value_width + d;
      store(to, fma(load(to), set(keep_[i]), sums));
    });
  }

  void finish(int rows, const Matrix<T>& out, float* lse) {
    float factor[kQueries];
    for (int i = 0; i < rows; ++i) {
      const float l = sum(load(sums_ + i * W));
      lse[i] = top_[i] + std::log(l);
      factor[i] = l == 0 ? 0 : 1 / l;
    }
    write_rows(out_, rows, p_.value_width, out, [&](int64_t i) { return factor[i]; });
  }

 private:
  // W rows at once: their vectors of maxima, transposed, give one vector with a lane for each row.
  void new_maximum(const Block& block, int first) {
    Vec tops[W];
    for (int i = 0; i < W; ++i) {
      tops[i] = set(-kInfinity);
      if (first + i >= block.rows) continue;
      const float* row = scores_ + (first + i) * kPitch;
      for (int j = 0; j < block.part_of(first + i); j += W) tops[i] = max(tops[i], load(row + j));
    }
    transpose(tops);
    const Vec before = load(top_ + first);
    Vec top = before;
    for (int i = 0; i < W; ++i) top = max(top, tops[i]);
    const Vec base = top == -kInfinity ? Vec{} : top;  // no key yet: e^(-inf - 0) = 0
    store(top_ + first, top);
    store(base_ + first, base);
    store(keep_ + first, softmax_exp(before - base));
  }

  // One row of scores into probabilities, units of T, and their sum; what is dropped still counts in it.
  void exponentials(const Block& block, int i) {
    float* row = scores_ + i * kPitch;
    const int keys = block.part_of(i);
    alignas(64) float kept[kKeys];
    if (p_.dropout)
      for (int j = 0; j < keys; j += Dropout::kGroup)
        p_.dropout.factors(p_.row(block.b, h_, block.row + i), block.key + j, kept + j);
    const Vec base = set(base_[i]);
    Vec total[2] = {load(sums_ + i * W) * keep_[i], Vec{}};
    for (int j = 0; j < keys; j += 2 * W) {
      Vec a = probability<T>(load(row + j), base);
      Vec b = j + W < keys ? probability<T>(load(row + j + W), base) : Vec{};
      total[0] += a;
      total[1] += b;
      if (p_.dropout) {
        a *= load(kept + j);
        if (j + W < keys) b *= load(kept + j + W);
      }
      if constexpr (Units<T>::depth == 2) {
        store(row + j / 2, round_to_pairs(a, b));
      } else {
        store(row + j, a);
        store(row + j + W, b);
      }
    }
    store(sums_ + i * W, total[0] + total[1]);
  }

  const Problem& p_;
  int64_t h_ = 0;
  float *left_, *scores_, *out_, *sums_, *top_, *base_, *keep_;
};

// Queries first .. last - 1 of the heads of one group.
template <class T>
void forward_chunk(const Problem& p, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                   const Tensor& lse, int64_t b, int64_t kv_head, int64_t first, int64_t last) {
  const int64_t first_key = p.first_key(b, first) / kKeys * kKeys, end_key = p.end_key(b, last - 1);
  const int64_t blocks = ceil_div(std::max<int64_t>(0, end_key - first_key), kKeys);
  const int64_t key_size = packed_size<kPanel, T>(kKeys, p.dim);
  const int64_t value_size = packed_size<kPanel, T>(p.value_dim, kKeys);
  Scratch scratch(blocks * (key_size + value_size) + Queries<T>::floats(p));
  float *packed_keys = scratch.take(blocks * key_size), *packed_values = scratch.take(blocks * value_size);
  const auto k_head = head_of<const T>(k, b, kv_head), v_head = head_of<const T>(v, b, kv_head);
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t key = first_key + i * kKeys, n = std::min<int64_t>(kKeys, end_key - key);
    pack_panels<kPanel>(k_head.some_rows(key, n), packed_keys + i * key_size);
    pack_panels<kPanel>(v_head.some_rows(key, n).t(), packed_values + i * value_size);
  }
  Queries<T> queries(p, scratch);
  for (int64_t h = kv_head * p.group; h < (kv_head + 1) * p.group; ++h) {
    const auto q_head = head_of<const T>(q, b, h);
    const auto out_head = head_of<T>(out, b, h);
    for (int64_t row = first; row < last; row += kQueries) {
      const int rows = static_cast<int>(std::min<int64_t>(kQueries, last - row));
      queries.start(h, q_head.some_rows(row, rows));
      const int64_t seen = p.end_key(b, row + rows - 1);
      for (int64_t key = p.first_key(b, row) / kKeys * kKeys; key < seen; key += kKeys) {
        const int64_t i = (key - first_key) / kKeys;
        queries.add(Block(p, b, row, last, key, end_key), packed_keys + i * key_size,
                    packed_values + i * value_size);
      }
      queries.finish(rows, out_head.some_rows(row, rows), lse.as<float>() + p.row(b, h, row));
    }
  }
}

template <class T>
void forward(const Problem& p, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
             const Tensor& lse) {
  // chunks as long as they can be with 8 tasks for each thread: every chunk packs the keys again
  const int64_t groups = p.batch * p.kv_heads, cut = ceil_div(8 * threads(), std::max<int64_t>(1, groups));
  const int64_t chunk = std::max<int64_t>(2 * kQueries, round_up(ceil_div(p.s_q, cut), kQueries));
  const int64_t chunks = ceil_div(p.s_q, chunk);
  parallel_for(groups * chunks, true, [&](int64_t task) {
    const int64_t first = (chunks - 1 - task / groups) * chunk;  // the last see most keys: they start first
    forward_chunk<T>(p, q, k, v, out, lse, task % groups / p.kv_heads, task % p.kv_heads, first,
                     std::min(first + chunk, p.s_q));
  });
}

}  // namespace
}  // namespace attn

void attention_fwd(Tensor q, Tensor k, Tensor v, Tensor mask, Tensor alibi_slopes, Tensor sinks, Tensor spans,
                   Tensor seed, int64_t diagonal, OptionalInt left, OptionalInt right, double scale,
                   double softcap, double dropout_p, Tensor out, Tensor lse) {
  const attn::Problem problem(q, k, v, {mask, alibi_slopes, sinks, spans, seed, diagonal, left, right, scale,
                                        softcap, dropout_p});
  with_type(q.dtype, [&](auto t) { attn::forward<decltype(t)>(problem, q, k, v, out, lse); });
}

KERNEL(attention_fwd);

}  // namespace llmkern
