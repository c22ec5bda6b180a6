// The inner loops of decode attention: products of queries with the rows of a cache, and sums of its rows.
#pragma once

#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace llmkern::decode {

constexpr int kChunk = 128;  // positions of a task, from one row of scores to the next
constexpr int kAhead = 64;   // most positions that are asked for ahead of time
constexpr int kAheadBytes = 4096;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int lanes(int64_t i, int64_t end) { return static_cast<int>(std::clamp<int64_t>(end - i, 0, W)); }

// How elements of a cache meet queries and weights: as floats, or as pairs of bfloat16 in a float's bits.
template <class C, bool pairs = has_bf16_dot && std::is_same_v<C, bf16>>
struct Units {
  static constexpr int depth = 1;  // elements in a lane
  static Vec row(const C* p, int64_t left) { return load(p, static_cast<int>(std::min<int64_t>(left, W))); }
  static Vec add_product(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
  static void put(float* to, int64_t i, Vec x) { store(to + i, x); }
  // V vectors of the row of values.
  template <int V>
  static void values(const C* const* rows, int64_t d, int64_t left, Vec (&to)[V]) {
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) to[i] = row(rows[0] + d + i * W, V > 1 ? W : left);
  }
};

template <class C>
struct Units<C, true> {
  static constexpr int depth = 2;
  static Vec row(const C* p, int64_t left) {
    if (left >= 2 * W) return load(reinterpret_cast<const float*>(p));
    C rest[2 * W] = {};
    std::memcpy(rest, p, left * sizeof(C));
    return load(reinterpret_cast<const float*>(rest));
  }
  static Vec add_product(Vec a, Vec b, Vec sum) { return dot(a, b, sum); }
  static void put(float* to, int64_t i, Vec x) { store(reinterpret_cast<bf16*>(to) + i, x); }
  // V vectors of pairs of two rows; d + left ends inside the last two.
  template <int V>
  static void values(const C* const* rows, int64_t d, int64_t left, Vec (&to)[V]) {
#pragma GCC unroll 2
    for (int i = 0; i < V; i += 2) {
      const Vec a = row(rows[0] + d + i * W, V > 2 ? 2 * W : left);
      const Vec b = row(rows[1] + d + i * W, V > 2 ? 2 * W : left);
      to[i] = zip_first(a, b), to[i + 1] = zip_second(a, b);
    }
  }
};

// Asks for `bytes` of a row that comes soon; the processor foresees neither pages nor the next chunk's row.
inline void ask(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) prefetch_l2(static_cast<const char*>(row) + i);
}

// scores[r][j] = scale q[r] · keys[j] for R queries; rows of scores are kChunk apart.  Rows `ahead` are
// asked for.
template <int R, class C>
void dots(const float* q, int64_t width, int64_t dim, C* const* keys, int n, float scale, float* scores,
          int ahead) {
  using U = Units<C>;
  // K keys at once: W sums, added up as a tree; three queries leave a quarter of it empty
  constexpr int K = W / (R == 3 ? 4 : R), step = W * U::depth;
  for (int j = 0; j < n; j += K, keys += K) {
    Vec sums[W];
#pragma GCC unroll 4
    for (int t = R * K; t < W; ++t) sums[t] = Vec{};
#pragma GCC unroll 16
    for (int t = 0; t < K; ++t) {  // one row after the other: the order in which memory is foreseen
      if (ahead) ask(keys[t + ahead], dim * sizeof(C));
      Vec sum[R] = {};
      int64_t d = 0;
      for (; d + step <= dim; d += step) {
        const Vec key = U::row(keys[t] + d, step);
        for (int r = 0; r < R; ++r) sum[r] = U::add_product(load(q + r * width + d / U::depth), key, sum[r]);
      }
      if (d < dim) {
        const Vec key = U::row(keys[t] + d, dim - d);
        for (int r = 0; r < R; ++r) sum[r] = U::add_product(load(q + r * width + d / U::depth), key, sum[r]);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[r * K + t] = sum[r];
    }
    float all[W];
    store(all, sum_of_each(sums) * scale);
    for (int r = 0; r < R; ++r) std::memcpy(scores + r * kChunk + j, all + r * K, K * sizeof(float));
  }
}

// out[r][d ..] += Σ_j p[r][j] values[j][d ..] for R queries and V vectors; `left` elements are left.
template <int R, int V, class C>
void add_values(const float* p, C* const* values, int n, int64_t d, int64_t left, float* out, int64_t width,
                int ahead) {
  using U = Units<C>;
  Vec sums[R][V];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < V; ++i) sums[r][i] = load(out + r * width + d + i * W);
  for (int j = 0; j < n; j += U::depth) {
    if (ahead)
      for (int t = 0; t < U::depth; ++t) ask(values[j + t + ahead] + d, V * W * sizeof(C));
    Vec value[V];
    U::values(values + j, d, left, value);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec weight = set(p[r * kChunk + j / U::depth]);
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) sums[r][i] = U::add_product(weight, value[i], sums[r][i]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < V; ++i) store(out + r * width + d + i * W, sums[r][i]);
}

template <int R, class C>
void values_step(const float* p, C* const* values, int n, int64_t dim, float* out, int64_t width, int ahead) {
  constexpr int V = W >= 16 ? 4 : 2, least = Units<C>::depth;
  int64_t d = 0;
  for (; d + V * W <= dim; d += V * W) add_values<R, V>(p, values, n, d, dim - d, out, width, ahead);
  for (; d < dim; d += least * W) add_values<R, least>(p, values, n, d, dim - d, out, width, ahead);
}

}  // namespace llmkern::decode
