// quant_linear: y = x Wᵀ + b for a weight of 8 or 4 bits an element, never whole in memory.
//
//   w = s q + m        q of 8 bits; s and m, 0 if there is none, of its group along the depth
//   w = s (q - 8)      q of 4 bits without m: m is -8 s
//
// A few rows of x (decoding) meet the weights where they are decoded, in registers: memory is the limit, a
// byte of codes has one use.  For more rows they are decoded into the panels of gemm.h, once.

#include <algorithm>
#include <type_traits>

#include "linear.h"
#include "quant_row.h"

namespace llmkern {
namespace quant {
namespace {

constexpr int kVecs = kBlock / W;  // the vectors of a block
constexpr int64_t kTaskRows = 4 * W;

// Rows of x up to which packing does not pay; with pairs of bfloat16 it pays earlier.
template <class T>
constexpr int64_t most_rows = Units<T>::depth == 2 ? 20 : 48;

// Codes of 8 bits.  Unscaled: s = 1 and m = 0, the scale of a whole row is left to its sum.
template <bool scaled>
struct Bytes {
  static constexpr int block_bytes = kBlock;
  Vec scale, offset;

  using Unscaled = Bytes<false>;
  static constexpr bool late = true;
  Bytes() = default;
  Bytes(float s, float m) : scale(set(s)), offset(set(m)) {}
  void decode(const uint8_t* p, Vec (&w)[kVecs]) const {
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) {
      w[i] = load(reinterpret_cast<const int8_t*>(p) + i * W);
      if (scaled) w[i] = fma(w[i], scale, offset);
    }
  }
};

// Codes of 4 bits: of 32 neighbours the first 16 in the low halves of 16 bytes, the last 16 in the high.
struct Nibbles {
  static constexpr int block_bytes = kBlock / 2;
  Codes codes;

  using Unscaled = Nibbles;
  static constexpr bool late = false;
  Nibbles() = default;
  Nibbles(float s, float m) : codes(s, m) {}
  void decode(const uint8_t* p, Vec (&w)[kVecs]) const {
#pragma GCC unroll 8
    for (int i = 0; i < kVecs / 2; ++i) {
      const IntVec bytes = load_bytes(p + i * W);
      w[i] = codes(bytes);
      w[kVecs / 2 + i] = codes(bytes >> 4);
    }
  }
};

// Calls body(Decoder type) with what the codes are.
template <class Body>
void with_decoder(const Weight& weight, const Body& body) {
  if (weight.nibbles) return body(std::common_type<Nibbles>{});
  weight.whole ? body(std::common_type<Bytes<false>>{}) : body(std::common_type<Bytes<true>>{});
}

// W rows, with their scales and offsets as floats: those of a group lie together.  Rows behind the last are
// the last again.
class Rows {
 public:
  const Weight& weight;
  const uint8_t* codes[W];

  explicit Rows(const Weight& w) : weight(w), buffer_(2 * W * ceil_div(w.groups, W) * W * sizeof(float)) {}
  // Scales of the W rows in a group, and behind them the offsets.
  const float* affine(int64_t group) const { return buffer_.as<float>() + group * 2 * W; }

  void read(int64_t first) {
    int64_t row[W];
    for (int i = 0; i < W; ++i) {
      row[i] = std::min(first + i, weight.rows - 1);
      codes[i] = weight.data + row[i] * weight.row_bytes;
    }
    if (weight.whole) {
      store(to(0), set(1.0f));
      return store(to(0) + W, set(weight.offset(1.0f)));
    }
    with_type(weight.scales.dtype, [&](auto type) {
      using S = decltype(type);
      for (int64_t g = 0; g < weight.groups; g += W) {
        Vec block[W];
        columns(weight.scales.as<S>(), row, g, block);
        for (int i = 0; i < W; ++i) store(to(g + i), block[i]);
        if (weight.mins) columns(weight.mins.as<S>(), row, g, block);
        for (int i = 0; i < W; ++i) store(to(g + i) + W, weight.mins ? block[i] : weight.offset(block[i]));
      }
    });
  }

 private:
  float* to(int64_t group) const { return buffer_.as<float>() + group * 2 * W; }
  // block[i] is what the rows have for group g + i.
  template <class S>
  void columns(const S* from, const int64_t (&row)[W], int64_t g, Vec (&block)[W]) const {
    const int n = static_cast<int>(std::min<int64_t>(W, weight.groups - g));
    for (int i = 0; i < W; ++i) block[i] = load(from + row[i] * weight.groups + g, n);
    transpose(block);
  }
  Buffer buffer_;
};

// sums[m][i] = x[m] · weight row i for i = first .. first + R - 1, each lane a part of it.  G: blocks of a
// group, where it is known to be 1.  Late: codes are multiplied as they are and the group's sum is scaled,
// s Σ q x + m Σ x, which for one row of x is less work than to scale the codes, unless a table does that.
template <class Decoder, int M, int R, int G>
[[gnu::noinline]] void dots(const float* x, const Rows& rows, int first, Vec (&sums)[M][W]) {
  constexpr bool late = M == 1 && Decoder::late;
  const Weight& weight = rows.weight;
  const int64_t width = weight.width(), group = G ? G : weight.group_blocks();
  const int64_t tile = R * weight.row_bytes, ahead = ceil_div(kAheadBytes, tile) * tile;
  const int64_t whole_blocks = weight.row_bytes / Decoder::block_bytes;  // the last may be short
  const bool mins = static_cast<bool>(weight.mins);
  const uint8_t* codes[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) codes[r] = rows.codes[first + r];
  Vec sum[M][R] = {}, part[R], x_sum;
  Decoder decoders[R];
#pragma GCC unroll 4
  for (int r = 0; late && r < R; ++r) decoders[r] = Decoder(1.0f, 0.0f);
  // loops that touch arrays are unrolled and inlined, each and all: one that is not keeps them in memory
  const auto step = [&](const uint8_t* const(&from)[R]) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      Vec w[kVecs];
      decoders[r].decode(from[r], w);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int i = 0; i < kVecs; ++i) {
          Vec& to = late ? part[r] : sum[m][r];
          to = fma(w[i], load(x + m * width + i * W), to);
        }
    }
    if (late && mins)
#pragma GCC unroll 8
      for (int i = 0; i < kVecs; ++i) x_sum += load(x + i * W);
  };
  const float* affine = rows.affine(0) + first;
  for (int64_t b = 0; b < weight.blocks; affine += 2 * W) {
    x_sum = Vec{};
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      part[r] = Vec{};
      if (!late) decoders[r] = Decoder(affine[r], affine[W + r]);
    }
    const int64_t end = b + group;
    for (; b < std::min(end, whole_blocks); ++b, x += kBlock) {
      step(codes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        prefetch_l2(codes[r] + ahead);
        codes[r] += Decoder::block_bytes;
      }
    }
    if (b < end) {  // codes behind the row's end are not read
      const int64_t left = weight.row_bytes - whole_blocks * Decoder::block_bytes;
      uint8_t rest[R][Decoder::block_bytes] = {};
      const uint8_t* from[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) from[r] = static_cast<uint8_t*>(std::memcpy(rest[r], codes[r], left));
      step(from);
      ++b;
    }
#pragma GCC unroll 4
    for (int r = 0; late && r < R; ++r) {
      sum[0][r] = fma(part[r], set(affine[r]), sum[0][r]);
      if (mins) sum[0][r] = fma(x_sum, set(affine[W + r]), sum[0][r]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sums[m][first + r] = sum[m][r];
}

// x, (M, D), as floats with zeros up to a whole block.
template <class T>
Buffer widened(const Matrix<const T>& x, int64_t width) {
  Buffer buffer(x.rows * width * sizeof(float));
  for (int64_t m = 0; m < x.rows; ++m) {
    float* to = buffer.as<float>() + m * width;
    if (x.col_stride == 1)
      for (int64_t k = 0; k < x.cols; k += W) {
        const int n = static_cast<int>(std::min<int64_t>(W, x.cols - k));
        store(to + k, load(x.at(m, k), n), n);
      }
    else
      for (int64_t k = 0; k < x.cols; ++k) to[k] = to_float(*x.at(m, k));
    std::fill(to + x.cols, to + width, 0.0f);
  }
  return buffer;
}

// A few rows.  epilogue(row, col, sums, n) as in gemm.h.
template <class Decoder, class Epilogue>
void multiply_few(const float* x, int64_t x_rows, const Weight& weight, const Epilogue& epilogue) {
  parallel_for(ceil_div(weight.rows, kTaskRows), false, [&](int64_t task) {
    Rows rows(weight);
    const int64_t end = std::min(weight.rows, (task + 1) * kTaskRows);
    for (int64_t col = task * kTaskRows; col < end; col += W) {
      rows.read(col);
      const int n = static_cast<int>(std::min<int64_t>(W, end - col));
      const auto tile = [&](int64_t m, auto count) {
        constexpr int M = decltype(count)::value, R = std::min(4, (W >= 16 ? 16 : 8) / M);
        using D = std::conditional_t<M == 1, typename Decoder::Unscaled, Decoder>;
        Vec sums[M][W];
        const float* from = x + m * weight.width();
        for (int i = 0; i < W; i += R)
          weight.group_blocks() == 1 ? dots<D, M, R, 1>(from, rows, i, sums)
                                     : dots<D, M, R, 0>(from, rows, i, sums);
        for (int i = 0; i < M; ++i) epilogue(m + i, col, sum_of_each(sums[i]), n);
      };
      int64_t m = 0;
      for (; W >= 16 && m + 8 <= x_rows; m += 8) tile(m, std::integral_constant<int, W >= 16 ? 8 : 4>{});
      for (; m + 4 <= x_rows; m += 4) tile(m, std::integral_constant<int, 4>{});
      for (; m + 2 <= x_rows; m += 2) tile(m, std::integral_constant<int, 2>{});
      if (m < x_rows) tile(m, std::integral_constant<int, 1>{});
    }
  });
}

// Rows first .. first + n - 1 of the weight, rounded to T, to `to`, weight.width() apart.
template <class Decoder, class T>
void decode(const Weight& weight, int64_t first, int64_t n, T* to) {
  const Buffer affine(2 * weight.groups * sizeof(float));
  float *scale = affine.as<float>(), *offset = scale + weight.groups;
  for (int64_t row = first; row < first + n; ++row) {
    weight.affine(row, scale, offset);
    const uint8_t* codes = weight.data + row * weight.row_bytes;
    int64_t left = weight.row_bytes;
    for (int64_t g = 0; g < weight.groups; ++g) {
      const Decoder decoder(scale[g], offset[g]);
      for (int64_t b = 0; b < weight.group_blocks(); ++b, to += kBlock) {
        uint8_t rest[Decoder::block_bytes] = {};
        const bool whole = left >= Decoder::block_bytes;
        Vec w[kVecs];
        decoder.decode(whole ? codes : static_cast<uint8_t*>(std::memcpy(rest, codes, left)), w);
        for (int i = 0; i < kVecs; ++i) store(to + i * W, w[i]);
        codes += Decoder::block_bytes, left -= Decoder::block_bytes;
      }
    }
  }
}

template <class T>
Buffer as_floats(const Tensor& bias, int64_t n) {
  Buffer floats(n * sizeof(float));
  for (int64_t i = 0; bias && i < n; ++i) floats.as<float>()[i] = to_float(bias.as<T>()[i * bias.stride[0]]);
  return floats;
}

// Calls body(first, n) for parts of the weight's rows that stay in the shared cache once they are decoded.
template <class Body>
void for_parts(const Weight& weight, const Body& body) {
  const int64_t tiles = kPackedBytes / (weight.width() * kTileCols * sizeof(float));
  const int64_t rows = std::max<int64_t>(1, tiles) * kTileCols;
  for (int64_t first = 0; first < weight.rows; first += rows) body(first, std::min(rows, weight.rows - first));
}

}  // namespace
}  // namespace quant

void quant_linear_fwd(Tensor x, Tensor qweight, Tensor scales, Tensor mins, Tensor bias, Tensor y) {
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    const quant::Weight weight(qweight, scales, mins, x.size[1], true);
    const Buffer biases = quant::as_floats<T>(bias, weight.rows);
    const Matrix<const T> rows(x);
    const Matrix<T> out(y);
    const auto result = [&](int64_t row, int64_t col, Vec v, int n) {
      v *= weight.factor(col, n);
      if (bias) v += load(biases.as<float>() + col, n);
      store(out.at(row, col), v, n);
    };
    if (rows.rows == 1 && quant::takes_digits(weight)) {
      const Buffer wide = quant::widened(rows, weight.width());
      return quant::multiply_row({wide.as<float>(), weight.depth, static_cast<bool>(mins)}, weight, result);
    }
    quant::with_decoder(weight, [&](auto decoder) {
      using Decoder = typename decltype(decoder)::type;
      if (rows.rows <= quant::most_rows<T>) {
        const Buffer wide = quant::widened(rows, weight.width());
        return quant::multiply_few<Decoder>(wide.as<float>(), rows.rows, weight, result);
      }
      const auto decoded = [&](int64_t first, int64_t n, T* to) { quant::decode<Decoder>(weight, first, n, to); };
      const MadeRows<decltype(decoded)> made{decoded, 0, weight.rows, weight.depth, weight.width()};
      multiply_in_parts(rows, made, result, {Touched(out.data, out.row_stride)});
    });
  });
}

// dx = dy W, db = column sums of dy
void quant_linear_bwd(Tensor dy, Tensor qweight, Tensor scales, Tensor mins, std::vector<bool>, Tensor dx,
                      Tensor dbias) {
  with_type(dy.dtype, [&](auto type) {
    using T = decltype(type);
    const Matrix<const T> rows(dy);
    Sum<T>(dbias, 1).add_columns(rows);
    if (!dx.count()) return;
    const quant::Weight weight(qweight, scales, mins, dx.size[1], false);
    int64_t parts = 0;
    quant::for_parts(weight, [&](int64_t, int64_t) { ++parts; });
    Sum<T> sum(dx, parts);
    quant::with_decoder(weight, [&](auto decoder) {
      using Decoder = typename decltype(decoder)::type;
      quant::for_parts(weight, [&](int64_t first, int64_t n) {
        const Buffer dense(n * weight.width() * sizeof(T));
        parallel_for(n, false, [&](int64_t i) {
          quant::decode<Decoder>(weight, first + i, 1, dense.as<T>() + i * weight.width());
        });
        const Matrix<const T> part(dense.as<T>(), n, weight.depth, weight.width(), 1);
        sum.add(rows.t().some_rows(first, n).t(), part.t());
      });
    });
  });
}

KERNEL(quant_linear_fwd);
KERNEL(quant_linear_bwd);

}  // namespace llmkern
