// What both directions of attention share: the problem, its mask, the product of packed blocks.
//
// A product of blocks is C[m][n] (+)= Σ_k A[m][k] B[k][n].  B lies in panels of kPanel columns,
// [k][kPanel], packed by pack.h; A is read as broadcast operands and is either packed in panels of W
// rows, [k][W], or the block of probabilities as softmax left it.  k counts units: floats, or pairs of
// bfloat16 where the processor multiplies those (see pack.h).
//
// Blocking, with the numbers of AVX-512 on a core with 32 KiB and 1 MiB of cache, head dim 64, floats:
//   registers  a tile of 8 x 32: 16 sums, 2 of B, of 32 registers; a step is 16 multiply-adds (16 cycles
//              on a core that starts one a cycle) for 10 loads, and 16 sums cover their latency of 4.
//   L1         scores of a block of 32 queries x 128 keys, 18 KiB, and a panel of B, 64 x 32 floats =
//              8 KiB, which meets all rows of A before the next one comes.
//   L2         keys and values of a block, 64 KiB, cross from L2 (a head of 2048 tokens: from L3) once for
//              32 x 128 x 128 multiply-adds, 32,768 cycles: 2 bytes a cycle of the 32 that L2 gives.
//              Backward holds P, dS and three packings of 128 keys, 150 KiB, and streams the queries.
// The exponential takes 12 operations for every 128 multiply-adds, 10 for every 64 where they are pairs.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "buffer.h"
#include "pack.h"
#include "philox.h"
#include "threads.h"

namespace llmkern::attn {

constexpr int kTileRows = W >= 8 ? W / 2 : 4;  // divides W: a tile of keys lies in one vector of a row
constexpr int kPanel = 2 * W;                  // columns of B in a panel
constexpr int kQueries = 32, kKeys = 128;      // of a block of scores
constexpr int kPitch = kKeys + 16;  // floats from row to row of it: rows must not meet in one cache set
constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline int64_t round_up(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }

// The op's arguments beside query, key and value (llmkern/ops/attention_rules.py).
struct Rules {
  Tensor mask, alibi_slopes, sinks, spans, seed;
  int64_t diagonal;
  OptionalInt left, right;
  double scale, softcap, dropout_p;
};

// Shapes, and which keys a query sees.  Both ends of what it sees never fall from one query to the next.
struct Problem {
  int64_t batch, heads, kv_heads, group, s_q, s_k, dim, width;  // width: dim rounded up to vectors
  int64_t value_dim, value_width;
  float scale, softcap;
  Dropout dropout;

  Problem(const Tensor& q, const Tensor& k, const Tensor& v, const Rules& rules)
      : batch(q.size[0]), heads(q.size[1]), kv_heads(k.size[1]), group(heads / kv_heads), s_q(q.size[2]),
        s_k(k.size[2]), dim(q.size[3]), width(round_up(dim, W)), value_dim(v.size[3]),
        value_width(round_up(value_dim, W)), scale(static_cast<float>(rules.scale)),
        softcap(static_cast<float>(rules.softcap)), dropout(rules.seed, rules.dropout_p), rules_(rules),
        left_(limit(rules.left)), right_(limit(rules.right)) {}

  // The first key that a query sees, and the end of the keys that it sees.
  int64_t first_key(int64_t b, int64_t query) const { return within(b, query, position(b, query) - left_); }
  int64_t end_key(int64_t b, int64_t query) const {
    return within(b, query, position(b, query) + right_ + 1);
  }
  // The first query that sees `key` or one behind it, and the first that sees only keys behind it.
  int64_t first_query(int64_t b, int64_t key) const {
    return first_that([&](int64_t query) { return end_key(b, query) > key; });
  }
  int64_t end_query(int64_t b, int64_t key) const {
    return first_that([&](int64_t query) { return first_key(b, query) > key; });
  }

  int64_t row(int64_t b, int64_t h, int64_t query) const { return (b * heads + h) * s_q + query; }
  float sink(int64_t h) const { return rules_.sinks.as<float>()[h]; }
  bool has_sinks() const { return static_cast<bool>(rules_.sinks); }

  bool changes_scores() const { return softcap > 0 || rules_.alibi_slopes || rules_.mask; }
  // Caps scores, whole vectors of them; the derivative goes to `slopes`, if any.
  void cap(int n, float* scores, float* slopes) const {
    for (int j = 0; j < n; j += W) {
      const Vec bent = tanh(load(scores + j) * (1 / softcap));
      store(scores + j, bent * softcap);
      if (slopes) store(slopes + j, 1.0f - bent * bent);
    }
  }
  // Adds ALiBi and mask to the scores of a query and keys key .. key + n - 1.
  void add_biases(int64_t b, int64_t h, int64_t query, int64_t key, int n, float* scores) const {
    if (rules_.alibi_slopes) add_alibi(b, h, query, key, n, scores);
    if (rules_.mask) add_mask(b, h, query, key, n, scores);
  }

 private:
  int64_t limit(OptionalInt side) const {
    const int64_t most = s_q + s_k + std::abs(rules_.diagonal);
    return side.given ? std::min(side.value, most) : most;
  }
  const int64_t* span(int64_t b, int which) const {
    return rules_.spans.as<int64_t>() + b * rules_.spans.stride[0] + which * rules_.spans.stride[1];
  }
  int64_t position(int64_t b, int64_t query) const {
    return query + (rules_.spans ? span(b, 2)[query] : rules_.diagonal);
  }
  int64_t within(int64_t b, int64_t query, int64_t key) const {
    if (!rules_.spans) return std::clamp<int64_t>(key, 0, s_k);
    return std::clamp(key, span(b, 0)[query], span(b, 1)[query]);
  }
  template <class F>
  int64_t first_that(const F& holds) const {
    int64_t low = 0, high = s_q;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      holds(middle) ? high = middle : low = middle + 1;
    }
    return low;
  }

  void add_alibi(int64_t b, int64_t h, int64_t query, int64_t key, int n, float* scores) const {
    const Tensor& slopes = rules_.alibi_slopes;
    const float slope = slopes.as<float>()[b * slopes.stride[0] + h * slopes.stride[1]];
    Vec distance = set(static_cast<float>(key - position(b, query)));
    for (int i = 0; i < W; ++i) distance[i] += static_cast<float>(i);
    for (int j = 0; j < n; j += W, distance += static_cast<float>(W))
      store(scores + j, load(scores + j) - slope * max(distance, -distance));
  }
  void add_mask(int64_t b, int64_t h, int64_t query, int64_t key, int n, float* scores) const {
    const Tensor& mask = rules_.mask;
    const int64_t* strides = mask.stride;
    const int64_t at = b * strides[0] + h * strides[1] + query * strides[2] + key * strides[3];
    if (mask.dtype == DType::boolean)
      change(mask.as<uint8_t>() + at, n, scores, [](uint8_t see, float s) { return see ? s : -kInfinity; });
    else
      with_type(mask.dtype, [&](auto t) {
        using T = decltype(t);
        change(mask.as<T>() + at, n, scores, [](T m, float s) { return s + to_float(m); });
      });
  }
  template <class T, class F>
  void change(const T* mask, int n, float* scores, const F& f) const {
    const int64_t stride = rules_.mask.stride[3];
    if (stride == 1)  // a loop of its own: the compiler makes vectors of it
      for (int j = 0; j < n; ++j) scores[j] = f(mask[j], scores[j]);
    else
      for (int j = 0; j < n; ++j) scores[j] = f(mask[j * stride], scores[j]);
  }

  Rules rules_;
  int64_t left_, right_;
};

// The (length, dim) matrix of one head.
template <class T>
Matrix<T> head_of(const Tensor& t, int64_t b, int64_t h) {
  return {t.as<T>() + b * t.stride[0] + h * t.stride[1], t.size[2], t.size[3], t.stride[2], 1};
}

// Floats that a matrix takes in panels of P rows.
template <int P, class T>
int64_t packed_size(int64_t rows, int64_t depth) {
  return ceil_div(rows, P) * panel_size<P>(ceil_div(depth, Units<T>::depth));
}
template <int P, class T>
void pack_panels(const Matrix<T>& m, float* to) {
  Packing<P, std::remove_const_t<T>>(m, 0, 0, m.cols).run(ceil_div(m.rows, P), to);
}

// A block of scores of batch b: queries row .. row + rows - 1, keys key .. key + keys - 1.  The diagonal cuts it in
// steps of tiles: a tile of queries has only those vectors of keys that its last query sees.
struct Block {
  int64_t b, row, key;
  int rows, keys;
  int part[kQueries / kTileRows];  // keys of each tile, a multiple of W

  Block(const Problem& p, int64_t b, int64_t row, int64_t row_end, int64_t key, int64_t key_end)
      : b(b), row(row), key(key), rows(static_cast<int>(std::min<int64_t>(kQueries, row_end - row))),
        keys(static_cast<int>(std::min<int64_t>(kKeys, key_end - key))) {
    for (int t = 0; t < tiles(); ++t) {
      const int64_t last = row + std::min((t + 1) * kTileRows, rows) - 1;
      part[t] = static_cast<int>(round_up(std::clamp<int64_t>(p.end_key(b, last) - key, 0, keys), W));
    }
  }
  int tiles() const { return static_cast<int>(ceil_div(rows, kTileRows)); }
  int part_of(int i) const { return part[i / kTileRows]; }
  // The first query of the first tile that has key j of the block.
  int first_row(int j) const {
    int t = 0;
    while (t < tiles() && part[t] <= j) ++t;
    return t * kTileRows;
  }
  // Finishes the scores, and makes those -inf that are out of sight.
  void finish(const Problem& p, int64_t h, float* scores, float* slopes = nullptr) const {
    if (!p.changes_scores() && is_whole(p)) return;
    for (int i = 0; i < rows; ++i, scores += kPitch) {
      const int end = within(p.end_key(b, row + i), i), first = std::min(within(p.first_key(b, row + i), i), end);
      if (p.softcap > 0) p.cap(part_of(i), scores, slopes ? slopes + i * kPitch : nullptr);
      p.add_biases(b, h, row + i, key, end, scores);
      std::fill(scores, scores + first, -kInfinity);
      std::fill(scores + end, scores + part_of(i), -kInfinity);
    }
  }

 private:
  // Whether every query sees every key, in whole vectors.
  bool is_whole(const Problem& p) const {
    return keys % W == 0 && p.end_key(b, row) >= key + keys && p.first_key(b, row + rows - 1) <= key;
  }
  int within(int64_t k, int i) const {
    return static_cast<int>(std::clamp<int64_t>(k - key, 0, part_of(i)));
  }
};

// e^(score - base), as a unit of T holds it.
template <class T>
Vec probability(Vec score, Vec base) {
  return Units<T>::depth == 2 ? softmax_exp_short(score, base) : softmax_exp(score - base);
}

// sums = A B for kTileRows rows and `vecs` vectors; unit u of row i of A is a[i * Row + u * step].
template <int depth, int vecs, int Row, class Finish>
inline void tile(const float* a, int64_t step, const float* b, int units, const Finish& finish) {
  Vec sums[kTileRows][vecs] = {};
  for (int u = 0; u < units; ++u, a += step, b += kPanel) {
    Vec right[vecs];
#pragma GCC unroll 2
    for (int j = 0; j < vecs; ++j) right[j] = load(b + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      const Vec left = set(a[i * Row]);
#pragma GCC unroll 2
      for (int j = 0; j < vecs; ++j)
        sums[i][j] = depth == 2 ? dot(left, right[j], sums[i][j]) : fma(left, right[j], sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < vecs; ++j) finish(i, j * W, sums[i][j]);
}

// The same for the `columns` that are left in a panel.
template <int depth, int Row, class Finish>
inline void tile(const float* a, int64_t step, const float* b, int64_t units, int64_t columns,
                 const Finish& finish) {
  if (columns > W)
    tile<depth, 2, Row>(a, step, b, static_cast<int>(units), finish);
  else if (columns > 0)
    tile<depth, 1, Row>(a, step, b, static_cast<int>(units), finish);
}

// scores[i][j] = scale · Σ_d left[i][d] right[j][d]
template <class T>
void multiply_scores(const Block& block, int64_t dim, const float* left, const float* right, float scale,
                     float* scores) {
  constexpr int depth = Units<T>::depth;
  const int64_t units = ceil_div(dim, depth);
  for (int j = 0; j < block.keys; j += kPanel, right += panel_size<kPanel>(units))
    for (int t = 0; t < block.tiles(); ++t) {
      const int i0 = t * kTileRows;
      float* to = scores + i0 * kPitch + j;
      tile<depth, 1>(left + i0 / W * panel_size<W>(units) + i0 % W, W, right, units, block.part[t] - j,
                     [&](int i, int c, Vec sums) { store(to + i * kPitch + c, sums * scale); });
    }
}

// finish(i, d, Σ_j scores[i][j] values[j][d]) for the queries i that see a key of the block
template <class T, class Finish>
void multiply_rows(const Block& block, const float* scores, const float* values, int64_t width,
                   const Finish& finish) {
  constexpr int depth = Units<T>::depth;
  for (int64_t d = 0; d < width; d += kPanel, values += packed_size<kPanel, T>(kPanel, block.keys))
    for (int t = 0; t < block.tiles(); ++t) {
      const int i0 = t * kTileRows, keys = std::min(block.part[t], block.keys);
      if (keys)
        tile<depth, kPitch>(scores + i0 * kPitch, 1, values, ceil_div(keys, depth), width - d,
                            [&](int i, int c, Vec sums) { finish(i0 + i, d + c, sums); });
    }
}

// finish(j, d, Σ_i scores[i][j] values[i][d]) for the keys j that a query of the block sees; pairs lie
// zipped, (scores[2i][j], scores[2i+1][j]) in the place of scores[2i][j]
template <class T, class Finish>
void multiply_columns(const Block& block, const float* scores, const float* values, int64_t width,
                      const Finish& finish) {
  constexpr int depth = Units<T>::depth, step = depth * kPitch;
  const int64_t units = ceil_div(block.rows, depth);
  for (int64_t d = 0; d < width; d += kPanel, values += panel_size<kPanel>(units))
    for (int j0 = 0; j0 < block.keys; j0 += kTileRows) {
      const int64_t from = block.first_row(j0) / depth;
      if (from < units)
        tile<depth, 1>(scores + from * step + j0, step, values + from * kPanel, units - from, width - d,
                       [&](int j, int c, Vec sums) { finish(j0 + j, d + c, sums); });
    }
}

// Writes rows of floats, `width` apart, as T.
template <class T, class Factor>
void write_rows(const float* from, int64_t rows, int64_t width, const Matrix<T>& to, const Factor& factor) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t d = 0; d < to.cols; d += W) {
      const int n = static_cast<int>(std::min<int64_t>(W, to.cols - d));
      store(to.at(i, d), load(from + i * width + d) * factor(i), n);
    }
}

// Scratch that a task carves into arrays, each on a cache line of its own.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : buffer_((floats + 64 * kMost) * sizeof(float)), next_(buffer_.as<float>()) {}
  float* take(int64_t floats) { return std::exchange(next_, next_ + round_up(floats + W, 16)); }

 private:
  static constexpr int kMost = 16;  // arrays
  Buffer buffer_;
  float* next_;
};

}  // namespace llmkern::attn
