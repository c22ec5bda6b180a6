// The weights of gemv.h: dense rows, and codes in tiles.

#include "gemv.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "threads.h"

namespace llmkern {
namespace {

constexpr int64_t kAhead = 8192;  // bytes that are asked for in time for the latency of memory

float power(int n) {
  const int32_t bits = (n + 127) << 23;
  float two;
  std::memcpy(&two, &bits, 4);
  return two;
}

// One block of x; kMost keeps the first digit within a byte.
void digitise_block(const float* x, DigitBlock& to) {
  constexpr float kMost = 0x7f7f7f;  // 127 · 65536 + 127 · 256 + 127
  constexpr int kVecs = kBlock / W;
  Vec v[kVecs];
  IntVec top{};  // as whole numbers, in which infinity and NaN are the largest
  for (int i = 0; i < kVecs; ++i) {
    v[i] = load(x + i * W);
    const IntVec size = bits(v[i]) & 0x7fffffff;
    top = size > top ? size : top;
  }
  const int32_t most_bits = max_of(top);
  const int exponent = std::max((most_bits >> 23) - 127, -103);  // then the scale is no denormal
  if (exponent == 128) {
    std::memset(&to, 0, sizeof to);
    to.scale = to.sum = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  float most;
  std::memcpy(&most, &most_bits, 4);
  int up = 22 - exponent;
  if (most * power(up) > kMost) --up;
  const float factor = power(up);
  to.scale = power(-up);
  IntVec sums[kDigits] = {};
  for (int i = 0; i < kVecs; ++i) {
    IntVec rest = to_int(v[i] * factor);
    for (int d = 0; d < kDigits; ++d) {
      const IntVec digit = d + 1 < kDigits ? (rest << 24) >> 24 : rest;
      store_bytes(to.digits[d] + i * W, digit);
      sums[d] += digit;
      rest = (rest - digit) >> 8;
    }
  }
  for (int d = 0; d < kDigits; ++d) to.sums[d] = sum(sums[d]);
  to.sum = to.scale * (65536.0f * to.sums[2] + static_cast<float>(256 * to.sums[1] + to.sums[0]));
}

template <class T>
class DenseGemv : public Gemv {
 public:
  DenseGemv(const Tensor& w) : Gemv(w.size[0], w.size[1]), data_(w.as<T>()), stride_(w.stride[0]) {}

  void multiply(const Activations& x, int64_t tile, Vec* sums) const override {
    few_rows(x.rows, [&](int64_t m, auto count) { run<decltype(count)::value>(x, m, tile * W, sums + m); });
  }

 private:
  template <int M>
  void run(const Activations& x, int64_t m, int64_t first, Vec* to) const {
    constexpr int R = W / 4 < 4 ? W / 4 : 4;
    Vec all[M][W];
    for (int i = 0; i < W; i += R) {
      const T* row[R];
      for (int r = 0; r < R; ++r) row[r] = data_ + std::min(first + i + r, rows - 1) * stride_;
      Vec sum[M][R] = {};
      int64_t k = 0;
      for (; k + W <= depth; k += W) add<M, R>(x, m, k, W, row, sum);
      if (k < depth) add<M, R>(x, m, k, static_cast<int>(depth - k), row, sum);
      for (int j = 0; j < M; ++j)
        for (int r = 0; r < R; ++r) all[j][i + r] = sum[j][r];
    }
    for (int j = 0; j < M; ++j) to[j] = sum_of_each(all[j]);
  }
  template <int M, int R>
  [[gnu::always_inline]] static void add(const Activations& x, int64_t m, int64_t k, int n, const T* const (&row)[R],
                                         Vec (&sum)[M][R]) {
    Vec v[M];
#pragma GCC unroll 4
    for (int j = 0; j < M; ++j) v[j] = load(x.row(m + j) + k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      prefetch_l2(reinterpret_cast<const char*>(row[r] + k) + kAhead);
      const Vec w = load(row[r] + k, n);
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) sum[j][r] = fma(w, v[j], sum[j][r]);
    }
  }
  const void* begin(int64_t tile) const override { return data_ + tile * W * stride_; }

  const T* data_;
  int64_t stride_;
};

// How codes, and scales of type S, of W rows lie in a tile: for each group W scales and W mins, then for each
// block of 32 neighbours the codes of four of them of every row, and so on; those of 4 bits with the next
// four in the high halves.
template <class S, bool nibbles, bool mins>
class CodedGemv : public Gemv {
 public:
  CodedGemv(const Tensor& q, const Tensor& scales, const Tensor& min, int64_t depth, Arena& arena)
      : Gemv(q.size[0], depth),
        groups_(scales.size[1]),
        blocks_((depth + kBlock - 1) / kBlock),
        group_blocks_(groups_ == 1 ? blocks_ : blocks_ / groups_),
        tile_bytes_((groups_ * kGroupBytes + blocks_ * kBlockBytes + 63) / 64 * 64),
        data_(arena.take(tiles() * tile_bytes_)) {
    parallel_for(tiles(), false, [&](int64_t tile) { lay_out(q, scales, min, tile); });
  }

  void multiply(const Activations& x, int64_t tile, Vec* sums) const override {
    const uint8_t* from = data_ + tile * tile_bytes_;
    few_rows(x.rows, [&](int64_t m, auto count) {
      group_blocks_ == 1 ? run<decltype(count)::value, 1>(x, m, from, sums + m)
                         : run<decltype(count)::value, 0>(x, m, from, sums + m);
    });
  }

 private:
  static constexpr int64_t kGroupBytes = W * sizeof(S) * (mins ? 2 : 1);
  static constexpr int64_t kVectors = nibbles ? kBlock / 8 : kBlock / 4;  // of W · 4 bytes, in a block
  static constexpr int64_t kBlockBytes = kVectors * W * 4;
  static constexpr int kZero = nibbles ? (mins ? 0 : 8) : 128;  // the code, as it lies, of 0

  // G: blocks of a group, where it is known to be 1.
  template <int M, int G>
  void run(const Activations& x, int64_t m, const uint8_t* from, Vec* to) const {
    const int64_t group = G ? G : group_blocks_;
    const DigitBlock* in[M];
    Vec sums[M] = {};
    const float* row[M];
    for (int j = 0; j < M; ++j) in[j] = x.digits(m + j), row[j] = x.row(m + j);
    for (int64_t g = 0; g < groups_; ++g) {
      const Vec scale = load(reinterpret_cast<const S*>(from));
      const Vec min = mins ? load(reinterpret_cast<const S*>(from) + W) : Vec{};
      prefetch_l2(from + kAhead);
      from += kGroupBytes;
      Vec part[M] = {};
      float x_sum[M] = {};
      for (int64_t b = 0; b < group; ++b, from += kBlockBytes) {
        block<M>(in, row, from, part);
        for (int j = 0; j < M; ++j) x_sum[j] += in[j]->sum, ++in[j];
      }
      for (int j = 0; j < M; ++j) {
        sums[j] = fma(part[j], scale, sums[j]);
        if (mins) sums[j] = fma(set(x_sum[j]), min, sums[j]);
      }
    }
    for (int j = 0; j < M; ++j) to[j] = sums[j];
  }

  template <int M>
  [[gnu::always_inline]] static void block(const DigitBlock* const (&in)[M], const float* (&x)[M], const uint8_t* from, Vec (&part)[M]) {
    if constexpr (has_byte_dot)
      digits<M>(in, from, part);
    else
      floats<M>(x, from, part);
    for (int j = 0; j < M; ++j) x[j] += kBlock;
  }
  // The same in floats, for processors that do not multiply bytes.
  template <int M>
  static void floats(const float* const (&x)[M], const uint8_t* from, Vec (&part)[M]) {
    constexpr int kEach = nibbles ? 8 : 4, kBits = nibbles ? 4 : 8;
    for (int v = 0; v < kVectors; ++v) {
      IntVec codes;
      std::memcpy(&codes, from + v * sizeof codes, sizeof codes);
      for (int i = 0; i < kEach; ++i) {
        // the low halves of the four bytes come first
        const int shift = nibbles ? i % 4 * 8 + i / 4 * 4 : i * 8;
        const Vec q = __builtin_convertvector((codes >> shift & ((1 << kBits) - 1)) - kZero, Vec);
        for (int j = 0; j < M; ++j) part[j] = fma(q, set(x[j][v * kEach + i]), part[j]);
      }
    }
  }
  template <int M>
  [[gnu::always_inline]] static void digits(const DigitBlock* const (&in)[M], const uint8_t* from, Vec (&part)[M]) {
    IntVec acc[M][kDigits];
#pragma GCC unroll 4
    for (int j = 0; j < M; ++j)
#pragma GCC unroll 4
      for (int d = 0; d < kDigits; ++d) acc[j][d] = IntVec{} - kZero * in[j]->sums[d];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      IntVec codes;
      std::memcpy(&codes, from + v * sizeof codes, sizeof codes);
      prefetch_l2(from + v * sizeof codes + kAhead);
      const IntVec low = nibbles ? codes & 0x0f0f0f0f : codes, high = (codes >> 4) & 0x0f0f0f0f;
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j)
#pragma GCC unroll 4
        for (int d = 0; d < kDigits; ++d) {
          const int8_t* digits = in[j]->digits[d] + v * (nibbles ? 8 : 4);
          acc[j][d] = dot_bytes(low, digits, acc[j][d]);
          if (nibbles) acc[j][d] = dot_bytes(high, digits + 4, acc[j][d]);
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < M; ++j) {
      const Vec high = __builtin_convertvector((acc[j][2] << 8) + acc[j][1], Vec);
      const Vec all = fma(high, set(256.0f), __builtin_convertvector(acc[j][0], Vec));
      part[j] = fma(all, set(in[j]->scale), part[j]);
    }
  }

  void lay_out(const Tensor& q, const Tensor& scales, const Tensor& min, int64_t tile) {
    uint8_t* to = data_ + tile * tile_bytes_;
    for (int64_t g = 0; g < groups_; ++g) {
      for (const Tensor* t : {&scales, &min})
        for (int r = 0; *t && r < W; ++r, to += sizeof(S))
          std::memcpy(to, t->as<S>() + row(tile, r) * groups_ + g, sizeof(S));
      for (int64_t b = g * group_blocks_; b < (g + 1) * group_blocks_; ++b)
        for (int v = 0; v < kVectors; ++v)
          for (int r = 0; r < W; ++r)
            for (int i = 0; i < 4; ++i) *to++ = codes(q, row(tile, r), b * kBlock, v, i);
    }
  }
  int64_t row(int64_t tile, int r) const { return std::min(tile * W + r, rows - 1); }
  // The byte for elements 4 v + i, or 8 v + i and 8 v + 4 + i, of the block at k.
  uint8_t codes(const Tensor& q, int64_t row, int64_t k, int v, int i) const {
    const uint8_t* from = q.as<uint8_t>() + row * q.size[1];
    if (!nibbles) return k + 4 * v + i < depth ? from[k + 4 * v + i] ^ 0x80 : 0x80;
    const auto nibble = [&](int j) { return from[k / 2 + j % 16] >> (j / 16 * 4) & 15; };
    return static_cast<uint8_t>(nibble(8 * v + i) | nibble(8 * v + 4 + i) << 4);
  }
  const void* begin(int64_t tile) const override { return data_ + tile * tile_bytes_; }

  int64_t groups_, blocks_, group_blocks_, tile_bytes_;
  uint8_t* data_;
};

}  // namespace

void Activations::digitise() const {
  for (int64_t i = 0; i < rows * blocks; ++i) {
    const float* x = floats_.as<float>() + i * kBlock;
    DigitBlock& to = digits_.as<DigitBlock>()[i];
    if (has_byte_dot) {
      digitise_block(x, to);
      continue;
    }
    Vec total{};
    for (int k = 0; k < kBlock; k += W) total += load(x + k);
    to.sum = sum(total);
  }
}

std::unique_ptr<Gemv> make_gemv(const Tensor& weight, const Tensor& scales, const Tensor& mins, Arena& arena) {
  std::unique_ptr<Gemv> made;
  if (!scales) {
    with_type(weight.dtype, [&](auto t) { made = std::make_unique<DenseGemv<decltype(t)>>(weight); });
    return made;
  }
  with_type(scales.dtype, [&](auto t) {
    using S = decltype(t);
    const bool nibbles = weight.dtype == DType::u8;
    const int64_t depth = weight.size[1] * (nibbles ? 2 : 1);
    if (nibbles && mins) made = std::make_unique<CodedGemv<S, true, true>>(weight, scales, mins, depth, arena);
    else if (nibbles) made = std::make_unique<CodedGemv<S, true, false>>(weight, scales, mins, depth, arena);
    else if (mins) made = std::make_unique<CodedGemv<S, false, true>>(weight, scales, mins, depth, arena);
    else made = std::make_unique<CodedGemv<S, false, false>>(weight, scales, mins, depth, arena);
  });
  return made;
}

}  // namespace llmkern
