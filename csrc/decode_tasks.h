// Decode attention: one or a few new tokens of each sequence against its cache, which they join first.
//
// The limit is the bytes of the cache, so each is read once: all queries of the heads that share a key
// head are worked on together, keys and values straight from the cache's rows into registers.  A task is
// kChunk positions of one sequence and key head.  Scores of a chunk stay in the first cache, so its softmax
// needs no running maximum; the chunks' numerators, sums and maxima are merged in the order of the chunks.
// Chunks start at multiples of kChunk whatever the batch, the lengths and the threads: the same bits always.
//
// Work for a key and its value, D elements each, in vectors of W: 2 D / W loads that convert (1 operation
// for float and half, 2 for int8), shared by up to 4 queries; for each query 2 D / W multiply-adds, half as
// many where the processor multiplies pairs of bfloat16, 3 steps of a tree that sums W products at once and
// 2 of the softmax.  D = 64, W = 16, one query: 21 operations for floats, 29 for int8, while a core that reads
// 6 bytes a cycle from memory brings the 512 bytes of floats in 85 cycles and the 128 of int8 in 21.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "buffer.h"
#include "decode.h"
#include "threads.h"

namespace llmkern::decode {

constexpr int kStep = 32;  // positions whose values stay in the first cache for all queries
constexpr int kRows = 32;  // queries whose scores are held together
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Keys or values of all sequences, and the scales of int8.
struct Cache {
  Tensor data, scale, table;
  int64_t page;  // positions that lie together

  Cache(const Tensor& data, const Tensor& scale, const Tensor& table)
      : data(data), scale(scale), table(table), page(data.size[2]) {}
  int64_t capacity() const { return page * (table ? table.size[1] : 1); }
  int64_t page_of(int64_t b, int64_t position) const {
    return table ? table.as<int32_t>()[b * table.stride[0] + position / page] : b;
  }
  template <class C>
  C* row(int64_t page_index, int64_t h, int64_t i) const {
    return data.as<C>() + page_index * data.stride[0] + h * data.stride[1] + i * data.stride[2];
  }
  float& row_scale(int64_t page_index, int64_t h, int64_t i) const {
    return scale.as<float>()[page_index * scale.stride[0] + h * scale.stride[1] + i * scale.stride[2]];
  }
};

// The rows of a chunk, wherever they lie.
template <class C>
struct Rows {
  C* row[kChunk + kAhead];
  float scale[kChunk];

  Rows(const Cache& cache, int64_t b, int64_t h, int64_t first, int n) {
    for (int j = 0; j < n;) {
      const int64_t page = cache.page_of(b, first + j), i = (first + j) % cache.page;
      const int end = static_cast<int>(std::min<int64_t>(n, j + cache.page - i));
      for (int k = j; k < end; ++k) row[k] = cache.row<C>(page, h, i + k - j);
      if (cache.scale)
        for (int k = j; k < end; ++k) scale[k] = cache.row_scale(page, h, i + k - j);
      j = end;
    }
    std::fill(row + n, row + kChunk + kAhead, row[n - 1]);  // read in vain where keys are taken together
    std::fill(scale + n, scale + kChunk, 0.0f);
  }
};

struct Problem {
  Tensor q, key, value, seqlens, cos, sin, alibi, sinks;
  Cache k, v;
  int64_t batch, heads, kv_heads, group, s_q, dim, width, rows;  // width: dim rounded up to pairs of vectors
  bool interleaved;
  float scale, softcap;
  OptionalInt left;

  int64_t new_tokens() const { return key ? s_q : 0; }
  int64_t length(int64_t b) const {  // with the new tokens
    return new_tokens() +
           (seqlens.dtype == DType::i64 ? seqlens.as<int64_t>()[b] : seqlens.as<int32_t>()[b]);
  }
  int64_t position(int64_t b, int64_t i) const { return length(b) - s_q + i; }
  // The first position that some query of sequence b sees.
  int64_t first(int64_t b) const {
    return left.given ? std::clamp<int64_t>(position(b, 0) - left.value, 0, length(b)) : 0;
  }
  int64_t first_chunk(int64_t b) const { return first(b) / kChunk; }
  int64_t chunks(int64_t b) const { return ceil_div(length(b), kChunk) - first_chunk(b); }

  void check() const {
    const int64_t most = cos ? std::min(k.capacity(), cos.size[0]) : k.capacity(), pages = k.data.size[0];
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t before = length(b) - new_tokens();
      if (before < 0 || length(b) > most)
        throw std::invalid_argument("decode_attention: cache_seqlens has " + std::to_string(before) +
                                    ", with " + std::to_string(new_tokens()) +
                                    " new tokens, expected 0 to " + std::to_string(most) + " in all");
      for (int64_t i = 0; k.table && i < length(b); i += k.page) {
        const int64_t page = k.page_of(b, i);
        if (page < 0 || page >= pages)
          throw std::invalid_argument("decode_attention: block_table has " + std::to_string(page) +
                                      ", expected 0 to " + std::to_string(pages - 1));
      }
    }
  }
};

// x[0 .. dim) rotated as a token at `position` (Su et al. 2021, eq. 34); negative positions see nothing.
inline void rotate(const Problem& p, int64_t position, float* x) {
  if (!p.cos) return;
  const int64_t half = p.cos.size[1], at = std::max<int64_t>(position, 0);
  const float *cos = p.cos.as<float>() + at * p.cos.stride[0], *sin = p.sin.as<float>() + at * p.sin.stride[0];
  for (int64_t i = 0; i < half; ++i) {
    float &a = p.interleaved ? x[2 * i] : x[i], &b = p.interleaved ? x[2 * i + 1] : x[half + i];
    const float rotated = a * cos[i] - b * sin[i];
    b = b * cos[i] + a * sin[i];
    a = rotated;
  }
}

// Row i of head h of a (B, H, S_q, D) tensor as floats, zeros behind.
inline void read_row(const Tensor& x, int64_t b, int64_t h, int64_t i, int64_t width, float* to) {
  const int64_t dim = x.size[3];
  with_type(x.dtype, [&](auto t) {
    const auto* from = x.as<decltype(t)>() + b * x.stride[0] + h * x.stride[1] + i * x.stride[2];
    for (int64_t d = 0; d < width; d += W) store(to + d, load(from + d, lanes(d, dim)));
  });
}

// One new token into row `row` of the cache; int8 is x / scale with scale = max|x| / 127.
template <class C>
void write_row(const float* x, int64_t dim, C* row, float* scale) {
  if constexpr (std::is_same_v<C, int8_t>) {
    float largest = 0;
    for (int64_t d = 0; d < dim; ++d) largest = std::fabs(x[d]) > largest || x[d] != x[d] ? std::fabs(x[d]) : largest;
    *scale = largest / 127;
    const float divisor = std::max(*scale, 0x1p-126f);
    for (int64_t d = 0; d < dim; ++d) {
      const float value = std::nearbyint(x[d] / divisor);
      row[d] = static_cast<int8_t>(value > 127 ? 127 : value >= -127 ? value : -127);  // NaN: any
    }
  } else {
    for (int64_t d = 0; d < dim; d += W) store(row + d, load(x + d), lanes(d, dim));
  }
}

// New tokens of sequence b whose positions lie in the chunk.
template <class C>
void append(const Problem& p, int64_t b, int64_t h, int64_t first, int n, float* buffer) {
  const int64_t before = p.length(b) - p.s_q;
  for (int64_t i = std::max<int64_t>(0, first - before); i < std::min(p.s_q, first + n - before); ++i) {
    const int64_t position = before + i;
    for (const Cache* cache : {&p.k, &p.v}) {
      const bool keys = cache == &p.k;
      read_row(keys ? p.key : p.value, b, h, i, p.width, buffer);
      if (keys) rotate(p, position, buffer);
      const int64_t page = cache->page_of(b, position), row = position % cache->page;
      write_row(buffer, p.dim, cache->row<C>(page, h, row),
                cache->scale ? &cache->row_scale(page, h, row) : nullptr);
    }
  }
}

// Calls body(row, R{}) for tiles of 4 rows, and one of what is left.
template <class Body>
void row_tiles(int rows, const Body& body) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) body(r, std::integral_constant<int, 4>{});
  if (r + 3 == rows) body(r, std::integral_constant<int, 3>{});
  if (r + 2 == rows) body(r, std::integral_constant<int, 2>{});
  if (r + 1 == rows) body(r, std::integral_constant<int, 1>{});
}

// What one chunk gives for one query: max and sum of the exponentials, and Σ p v.
struct Partial {
  float *top, *total, *out;
  Partial(float* base, int64_t row, int64_t width) : top(base + row * (width + W)), total(top + 1), out(top + W) {}
};

// Scores of one query into weights of the values; it sees positions low .. high - 1 of the chunk.
template <class C>
void softmax(const Problem& p, float* scores, int n, int low, int high, float slope, float distance,
             const Rows<C>& keys, const Rows<C>& values, Partial to) {
  constexpr bool int8 = std::is_same_v<C, int8_t>;
  low = std::clamp(low, 0, n), high = std::clamp(high, low, n);
  const int end = (n + W - 1) / W * W;
  IntVec lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  if (int8 || p.softcap > 0 || slope != 0)
    for (int j = 0; j < end; j += W) {
      Vec s = load(scores + j);
      if (int8) s *= load(keys.scale + j);
      if (p.softcap > 0) s = p.softcap * tanh(s / p.softcap);
      if (slope != 0) s = fma(set(slope), __builtin_convertvector(lane + j, Vec) + distance, s);
      store(scores + j, s);
    }
  std::fill(scores, scores + low, -kInfinity);
  std::fill(scores + high, scores + end, -kInfinity);
  Vec tops = set(-kInfinity), total{};
  for (int j = 0; j < end; j += W) tops = max(tops, load(scores + j));
  *to.top = max_of(tops);
  const Vec base = set(*to.top == -kInfinity ? 0.0f : *to.top);
  for (int j = 0; j < end; j += W) {
    const Vec weight = softmax_exp(load(scores + j) - base);
    total += weight;
    Units<C>::put(scores, j, int8 ? weight * load(values.scale + j) : weight);
  }
  *to.total = sum(total);
}

// Positions first .. first + n - 1 of sequence b for the queries of key head h; partial: p.rows of Partial.
template <class C>
void run_chunk(const Problem& p, int64_t b, int64_t h, int64_t first, int n, float* partial) {
  Buffer scratch((kRows * (p.width + kChunk) + p.width) * sizeof(float));
  float *q = scratch.as<float>(), *scores = q + kRows * p.width;
  if (p.key) append<C>(p, b, h, first, n, scores + kRows * kChunk);
  const int ahead = static_cast<int>(std::clamp<int64_t>(kAheadBytes / (p.dim * sizeof(C)), 1, kAhead));
  Rows<C> keys(p.k, b, h, first, n);
  const Rows<C> values(p.v, b, h, first, n);
  if (n == kChunk) std::copy_n(values.row, kAhead, keys.row + n);  // after the keys come the values
  for (int64_t row = 0; row < p.rows; row += kRows) {
    const int rows = static_cast<int>(std::min<int64_t>(kRows, p.rows - row));
    for (int r = 0; r < rows; ++r) {
      const int64_t head = h * p.group + (row + r) / p.s_q, i = (row + r) % p.s_q;
      float* to = q + r * p.width;
      read_row(p.q, b, head, i, p.width, to);
      rotate(p, p.position(b, i), to);
      for (int64_t d = 0; d < p.width; d += W) Units<C>::put(to, d, load(to + d));
    }
    row_tiles(rows, [&](int r, auto count) {
      constexpr int R = decltype(count)::value;
      dots<R>(q + r * p.width, p.width, p.dim, keys.row, n, p.scale, scores + r * kChunk, r ? 0 : ahead);
    });
    for (int r = 0; r < rows; ++r) {
      const int64_t head = h * p.group + (row + r) / p.s_q, at = p.position(b, (row + r) % p.s_q) - first;
      const int64_t low = p.left.given ? at - p.left.value : 0;
      softmax(p, scores + r * kChunk, n, static_cast<int>(std::clamp<int64_t>(low, 0, n)),
              static_cast<int>(std::clamp<int64_t>(at + 1, 0, n)),
              p.alibi ? p.alibi.as<float>()[b * p.alibi.stride[0] + head * p.alibi.stride[1]] : 0.0f,
              static_cast<float>(-at), keys, values, Partial(partial, row + r, p.width));
      std::fill_n(Partial(partial, row + r, p.width).out, p.width, 0.0f);
    }
    for (int j = 0; j < n; j += kStep) {
      row_tiles(rows, [&](int r, auto count) {
        values_step<decltype(count)::value>(scores + r * kChunk + j / Units<C>::depth, values.row + j, std::min(kStep, n - j),
                                            p.dim, Partial(partial, row + r, p.width).out, p.width + W, r ? 0 : ahead);
      });
    }
  }
}

// out = Σ_c e^(m_c - m) out_c / Σ_c e^(m_c - m) l_c over the chunks c of one query, m the largest maximum.
inline void merge(const Problem& p, const float* partial, int64_t chunks, int64_t b, int64_t h, int64_t row,
           float* sums, const Tensor& out, const Tensor& lse) {
  const int64_t head = h * p.group + row / p.s_q, i = row % p.s_q, size = p.rows * (p.width + W);
  const auto part = [&](int64_t c) { return Partial(const_cast<float*>(partial) + c * size, row, p.width); };
  const float sink = p.sinks ? p.sinks.as<float>()[head * p.sinks.stride[0]] : -kInfinity;
  float top = sink;
  for (int64_t c = 0; c < chunks; ++c) top = std::max(top, *part(c).top);
  const float base = top == -kInfinity ? 0.0f : top;
  float total = std::exp(sink - base);
  std::fill_n(sums, p.width, 0.0f);
  for (int64_t c = 0; c < chunks; ++c) {
    const float factor = std::exp(*part(c).top - base);
    total += factor * *part(c).total;
    for (int64_t d = 0; d < p.width; d += W) store(sums + d, fma(set(factor), load(part(c).out + d), load(sums + d)));
  }
  lse.as<float>()[(b * p.heads + head) * p.s_q + i] = top + std::log(total);
  const float share = total == 0 ? 0.0f : 1 / total;
  with_type(out.dtype, [&](auto t) {
    auto* to = out.as<decltype(t)>() + b * out.stride[0] + head * out.stride[1] + i * out.stride[2];
    for (int64_t d = 0; d < p.dim; d += W) store(to + d, load(sums + d) * share, lanes(d, p.dim));
  });
}

// The tasks of all sequences and key heads: first every chunk, then every merge.
template <class C>
class Tasks {
 public:
  // `lengths` of a problem tell the chunks; problems of other layers have the same.
  explicit Tasks(const Problem& p) : start_(first_chunks(p)), size_(p.rows * (p.width + W)), kv_heads_(p.kv_heads),
        partials_(start_.back() * p.kv_heads * size_ * sizeof(float)) {}
  int64_t chunks() const { return start_.back() * kv_heads_; }
  int64_t merges() const { return static_cast<int64_t>(start_.size() - 1) * kv_heads_; }

  void run(const Problem& p, int64_t task) const {
    const int64_t chunk = task / kv_heads_, h = task % kv_heads_;
    const int64_t b = std::upper_bound(start_.begin(), start_.end(), chunk) - start_.begin() - 1;
    const int64_t c = chunk - start_[b], first = (p.first_chunk(b) + c) * kChunk;
    const int n = static_cast<int>(std::min<int64_t>(kChunk, p.length(b) - first));
    run_chunk<C>(p, b, h, first, n, partial(p, b, h) + c * size_);
  }
  void merge(const Problem& p, int64_t task, const Tensor& out, const Tensor& lse) const {
    const int64_t b = task / kv_heads_, h = task % kv_heads_;
    Buffer sums(p.width * sizeof(float));
    for (int64_t row = 0; row < p.rows; ++row)
      decode::merge(p, partial(p, b, h), p.chunks(b), b, h, row, sums.as<float>(), out, lse);
  }

 private:
  static std::vector<int64_t> first_chunks(const Problem& p) {
    std::vector<int64_t> start(p.batch + 1, 0);  // chunks of the sequences before
    for (int64_t b = 0; b < p.batch; ++b) start[b + 1] = start[b] + p.chunks(b);
    return start;
  }
  // The chunks of a sequence and head lie together: [b][h][chunk].
  float* partial(const Problem& p, int64_t b, int64_t h) const {
    return partials_.as<float>() + (start_[b] * kv_heads_ + h * p.chunks(b)) * size_;
  }
  std::vector<int64_t> start_;
  int64_t size_, kv_heads_;
  Buffer partials_;
};

}  // namespace llmkern::decode
