// One blocked matrix product for all kernels:  C[m][n] = Σ_k A[m][k] B[n][k],  sums in float, and an
// epilogue that sees every element once, complete.
//
//   Packed<T> w(weight);  // (N, K), packed by all threads; may be used again and again
//   const auto epilogue = [&](int64_t row, int64_t col, Vec c, int n) { store(y + row * N + col, c, n); };
//   multiply(x, w, epilogue, {Touched(y, N)});
//
// Blocking, with the numbers of AVX-512 on a core with 32 KiB, 1 MiB and a 32 MiB shared cache:
//   registers  a tile of 12 x 32: 24 sums + 2 of B = 26 of 32 registers; A enters as a broadcast operand.
//              A step along k is 24 multiply-adds for 14 loads, so arithmetic is the limit, and 24 sums
//              in flight cover the latency of 4 cycles twice and more.
//   L1         a panel of A, 12 x 384 floats = 18 KiB; the panel of B streams past it, 128 bytes in 24
//              cycles, prefetched.
//   L2         12 panels of A = 144 rows, 216 KiB, and the panel of B, 48 KiB, that all of them use.
//   L3         B packed, each thread its own part where there is enough for all (multiply_apart): a panel comes
//              in once for 144 rows, which is 48 KiB for 12 x 384 x 24 cycles, 0.4 bytes a cycle.
// bfloat16 pairs fill the same registers and bytes with twice the depth.
//
// A tile belongs to one thread and k runs in order, in blocks and chains that depend on K alone: the same bits for
// any number of threads.
#pragma once

#include <array>

#include "buffer.h"
#include "pack.h"
#include "threads.h"

namespace llmkern {

#if defined(__AVX512F__)
constexpr int kTileRows = 12, kTileCols = 32;  // 24 sums, 2 of B, of 32 registers
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTileCols = 16;  // 12 sums, 2 of B, 1 of A, of 16 registers
#else
constexpr int kTileRows = 4, kTileCols = 8;  // 8 sums, 2 of B, 1 of A, of 16 registers
#endif
constexpr int64_t kTile = kTileRows * kTileCols;
constexpr int64_t kDepth = 384;                  // units of a block along k
constexpr int64_t kChain = 128;                  // products of float that a sum takes one after the other
constexpr int64_t kRowPanels = 144 / kTileRows;  // most panels of A in a task
constexpr int64_t kColPanels = 768 / kTileCols;  // and of B: with K in blocks, 432 KiB of sums wait in L2
constexpr int64_t kPackedBytes = 16 << 20;       // of B, packed at a time when it is used once
constexpr int64_t kColsApart = 256, kRowsApart = 192;  // fewest of a thread that packs for itself,
constexpr int64_t kPackedApart = 2 << 20;              // and most bytes of B that each packs whole

// tile (kTileRows x kTileCols), or the first `rows` of it, = or += a · b over `units` steps of two packed panels.
//
// The error of a sum grows with the terms that it takes one after the other: chains of floats end after kChain
// of them, and are added up.  The products of bfloat16 have larger errors of their own.
template <int depth, int rows = kTileRows>
[[gnu::noinline]] void multiply_tile(int64_t units, const float* a, const float* b, float* tile, bool add) {
  constexpr int kVecs = kTileCols / W;
  const int64_t chains = depth == 1 ? std::max<int64_t>(1, ceil_div(units, kChain)) : 1;
  for (int64_t chain = 0; chain < chains; ++chain, add = true) {
    Vec sums[rows][kVecs] = {};
    for (int64_t u = share_of(units, chain, chains).size(); u > 0; --u, a += kTileRows, b += kTileCols) {
      Vec row[kVecs];
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        row[j] = load(b + j * W);
        prefetch(b + 8 * kTileCols + j * W);
      }
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        const Vec x = set(a[i]);
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j)
          sums[i][j] = depth == 2 ? dot(x, row[j], sums[i][j]) : fma(x, row[j], sums[i][j]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        float* to = tile + i * kTileCols + j * W;
        store(to, add ? sums[i][j] + load(to) : sums[i][j]);
      }
  }
}

// A second operand whose rows do not lie in memory: source(first, n, to) writes n of them to `to`, `stride`
// elements apart.
template <class Source>
struct MadeRows {
  const Source& source;
  int64_t first, rows, cols, stride;
  MadeRows some_rows(int64_t at, int64_t count) const { return {source, first + at, count, cols, stride}; }
};

// The second operand in panels, (ceil(N / kTileCols), units of K, kTileCols).
template <class T>
class Packed {
 public:
  const int64_t rows, depth;

  explicit Packed(const Matrix<const T>& m)
      : rows(m.rows),
        depth(m.cols),
        units_(ceil_div(depth, Units<T>::depth)),
        buffer_(panels() * size() * sizeof(float)) {
    parallel_for(panels(), false, [&](int64_t i) {
      Packing<kTileCols, T>(m, i * kTileCols, 0, depth).run(1, buffer_.as<float>() + i * size());
    });
  }
  template <class Source>
  explicit Packed(const MadeRows<Source>& m)
      : rows(m.rows),
        depth(m.cols),
        units_(ceil_div(depth, Units<T>::depth)),
        buffer_(panels() * size() * sizeof(float)) {
    parallel_for(panels(), false, [&](int64_t i) {
      const int64_t at = i * kTileCols, n = std::min<int64_t>(kTileCols, rows - at);
      const Buffer part(n * m.stride * sizeof(T));
      m.source(m.first + at, n, part.as<T>());
      const Matrix<const T> made(part.as<T>(), n, depth, m.stride, 1);
      Packing<kTileCols, T>(made, 0, 0, depth).run(1, buffer_.as<float>() + i * size());
    });
  }
  int64_t panels() const { return ceil_div(rows, kTileCols); }
  const float* panel(int64_t i, int64_t unit) const {
    return buffer_.as<float>() + i * size() + unit * kTileCols;
  }

 private:
  int64_t size() const { return panel_size<kTileCols>(units_); }
  int64_t units_;
  Buffer buffer_;
};

// `count` panels in equal parts of at most `most`, and at least `want` parts where there are as many.
inline int64_t part_size(int64_t count, int64_t most, int64_t want) {
  const int64_t parts = std::max(ceil_div(count, most), std::min(count, want));
  return parts ? ceil_div(count, parts) : 1;
}

// A matrix that an epilogue reads, or writes (data that is not const), where it is called: fetched while
// the sums are still running, for writing as the core's own, which another core may have had.
struct Touched {
  char* data = nullptr;
  int64_t row_bytes = 0, element_bytes = 0;
  bool written = false;

  Touched() = default;
  template <class T>
  Touched(T* data, int64_t row_stride)
      : data(reinterpret_cast<char*>(const_cast<std::remove_const_t<T>*>(data))),
        row_bytes(row_stride * sizeof(T)),
        element_bytes(sizeof(T)),
        written(!std::is_const_v<T>) {}
  void prefetch_tile(int64_t row, int64_t col) const {
    if (!data) return;
    char* at = data + row * row_bytes + col * element_bytes;
    for (int i = 0; i < kTileRows; ++i, at += row_bytes)
      for (int64_t byte = 0; byte < kTileCols * element_bytes; byte += 64)
        written ? prefetch_to_write(at + byte) : prefetch(at + byte);
  }
};
using TouchedList = std::array<Touched, 5>;

// Where complete tiles go: an epilogue behind one indirect call a tile, so that the blocked loops are
// compiled once for all epilogues.
class Finish {
 public:
  template <class Epilogue>
  Finish(const Epilogue& epilogue, const TouchedList& touched, int64_t rows, int64_t first_col, int64_t cols)
      : epilogue_(&epilogue),
        call_(&each<Epilogue>),
        touched_(touched),
        rows_(rows),
        first_col_(first_col),
        cols_(cols) {}
  void prepare(int64_t row, int64_t col) const {
    for (const Touched& t : touched_) t.prefetch_tile(row, first_col_ + col);
  }
  void operator()(const float* tile, int64_t row, int64_t col) const { call_(*this, tile, row, col); }
  // For a product that has `count` of the columns, those from `first` on.
  Finish columns(int64_t first, int64_t count) const {
    Finish part = *this;
    part.first_col_ += first;
    part.cols_ = count;
    return part;
  }

 private:
  template <class Epilogue>
  static void each(const Finish& f, const float* tile, int64_t row, int64_t col) {
    const Epilogue& epilogue = *static_cast<const Epilogue*>(f.epilogue_);
    const int64_t rows = std::min<int64_t>(kTileRows, f.rows_ - row);
    const int64_t cols = std::min<int64_t>(kTileCols, f.cols_ - col);
    for (int64_t i = 0; i < rows; ++i, tile += kTileCols)
      for (int64_t j = 0; j < cols; j += W)
        epilogue(row + i, f.first_col_ + col + j, load(tile + j),
                 static_cast<int>(std::min<int64_t>(W, cols - j)));
  }
  const void* epilogue_;
  void (*call_)(const Finish&, const float*, int64_t, int64_t);
  TouchedList touched_;
  int64_t rows_, first_col_, cols_;
};

// Panels `rows` of A times panels `cols` of B, by one thread.
template <class T>
void multiply_block(const Matrix<const T>& a, const Packed<T>& b, Range rows, Range cols,
                    const Finish& finish) {
  constexpr int depth = Units<T>::depth;
  const int64_t units = ceil_div(a.cols, depth), blocks = std::max<int64_t>(1, ceil_div(units, kDepth));
  const int64_t step = ceil_div(units, blocks);
  const Buffer panels(rows.size() * panel_size<kTileRows>(step) * sizeof(float));
  const Buffer sums((blocks > 1 ? rows.size() * cols.size() : 1) * kTile * sizeof(float));
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t u = block * step, n = std::min(step, units - u);
    Packing<kTileRows, T>(a, rows.begin * kTileRows, u * depth, std::min(n * depth, a.cols - u * depth))
        .run(rows.size(), panels.as<float>());
    for (int64_t j = 0; j < cols.size(); ++j)
      for (int64_t i = 0; i < rows.size(); ++i) {
        float* tile = sums.as<float>() + (blocks > 1 ? (j * rows.size() + i) * kTile : 0);
        const float* panel = panels.as<float>() + i * panel_size<kTileRows>(n);
        const int64_t row = (rows.begin + i) * kTileRows, col = (cols.begin + j) * kTileCols;
        const bool last = block + 1 == blocks;
        if (last) finish.prepare(row, col);
        multiply_tile<depth>(n, panel, b.panel(cols.begin + j, u), tile, block > 0);
        if (last) finish(tile, row, col);
      }
  }
}

// epilogue(row, col, values, n): n sums of row `row` from column `col` on, on some thread.
template <class T, class Epilogue>
void multiply(const Matrix<const T>& a, const Packed<T>& b, const Epilogue& epilogue,
              const TouchedList& touched = {}, int64_t first_col = 0) {
  const Finish finish(epilogue, touched, a.rows, first_col, b.rows);
  const int64_t row_panels = ceil_div(a.rows, kTileRows), col_panels = b.panels();
  const int64_t want = threads() > 1 ? 4 * threads() : 1;  // tasks, so that no thread waits long for another
  const int64_t tall = part_size(row_panels, kRowPanels, want), row_parts = ceil_div(row_panels, tall);
  const int64_t wide = part_size(col_panels, kColPanels, ceil_div(want, std::max<int64_t>(1, row_parts)));
  parallel_for(row_parts * ceil_div(col_panels, wide), true, [&](int64_t task) {
    const int64_t i = task % row_parts * tall, j = task / row_parts * wide;
    multiply_block(a, b, {i, std::min(i + tall, row_panels)}, {j, std::min(j + wide, col_panels)}, finish);
  });
}

// Rows of A times columns of B that this thread packs for itself.
template <class T, class Right>
void multiply_alone(const Matrix<const T>& a, const Right& b, Range rows, Range cols, const Finish& finish) {
  const int64_t first = cols.begin * kTileCols, count = std::min(cols.end * kTileCols, b.rows) - first;
  const Packed<T> own(b.some_rows(first, count));
  const Finish part = finish.columns(first, count);
  for (int64_t j = 0; j < own.panels(); j += kColPanels)
    for (int64_t i = rows.begin; i < rows.end; i += kRowPanels)
      multiply_block(a, own, {i, std::min(i + kRowPanels, rows.end)}, {j, std::min(j + kColPanels, own.panels())}, part);
}

// The same for a second operand that is used once, by threads that share no panel: to write a line that another
// core has in its cache, too, takes up to 28 ns, whatever is fetched ahead, and half of a shared panel's lines are
// such ones.  Threads that part the rows each pack all of B, if it is small, those that part the columns all of A:
// 5 % of the work where each has kRowsApart or kColsApart of them.  False, and nothing done, where there are fewer.
template <class T, class Right>
bool multiply_apart(const Matrix<const T>& a, const Right& b, const Finish& finish) {
  const int64_t row_panels = ceil_div(a.rows, kTileRows), col_panels = ceil_div(b.rows, kTileCols);
  const int64_t workers = threads(), bytes = b.rows * ceil_div(b.cols, Units<T>::depth) * 4;
  const bool by_rows = a.rows >= kRowsApart * workers && bytes <= kPackedApart;
  const bool by_cols = b.rows >= kColsApart * workers;
  if (by_rows && (a.rows > b.rows || !by_cols)) {
    parallel_for(workers, true, [&](int64_t task) {
      multiply_alone(a, b, share_of(row_panels, task, workers), {0, col_panels}, finish);
    });
  } else if (by_cols) {
    const int64_t each = ceil_div(col_panels, workers * kColPanels);  // tasks of a thread
    const int64_t wide = ceil_div(col_panels, workers * each);
    parallel_for(ceil_div(col_panels, wide), true, [&](int64_t task) {
      const Range cols{task * wide, std::min((task + 1) * wide, col_panels)};
      multiply_alone(a, b, {0, row_panels}, cols, finish);
    });
  }
  return by_rows || by_cols;
}

// The same for at most kTileRows rows of A, which meet each panel of B as soon as it is packed, in the first
// cache: to read B is all that takes time.  Each sum is that of `multiply_block`, bit for bit.
template <class T>
void multiply_few(const Matrix<const T>& a, const Matrix<const T>& b, const Finish& finish) {
  constexpr int depth = Units<T>::depth;
  const int64_t units = ceil_div(a.cols, depth), blocks = std::max<int64_t>(1, ceil_div(units, kDepth));
  const int64_t step = ceil_div(units, blocks), a_size = panel_size<kTileRows>(step);
  const auto block_of = [&](int64_t u) { return std::min(std::min(step, units - u) * depth, a.cols - u * depth); };
  const Buffer a_panels(blocks * a_size * sizeof(float));
  for (int64_t u = 0, i = 0; i < blocks; u += step, ++i)
    Packing<kTileRows, T>(a, 0, u * depth, block_of(u)).run(1, a_panels.as<float>() + i * a_size);
  const auto multiply_rows = a.rows == 1   ? multiply_tile<depth, 1>
                             : a.rows == 2 ? multiply_tile<depth, 2>
                             : a.rows <= 4 ? multiply_tile<depth, 4>
                                           : multiply_tile<depth>;
  // columns of B that are neighbours are read a kilobyte at a time
  const int64_t panels = ceil_div(b.rows, kTileCols), wide = b.row_stride == 1 ? 256 / kTileCols : 1;
  parallel_for(ceil_div(panels, wide), false, [&](int64_t task) {
    const int64_t first = task * wide, count = std::min(wide, panels - first);
    const Buffer b_panels(count * panel_size<kTileCols>(step) * sizeof(float)), sums(count * kTile * sizeof(float));
    for (int64_t u = 0, i = 0; i < blocks; u += step, ++i) {
      const int64_t n = std::min(step, units - u);
      Packing<kTileCols, T>(b, first * kTileCols, u * depth, block_of(u)).run(count, b_panels.as<float>());
      for (int64_t j = 0; j < count; ++j)
        multiply_rows(n, a_panels.as<float>() + i * a_size, b_panels.as<float>() + j * panel_size<kTileCols>(n),
                      sums.as<float>() + j * kTile, i > 0);
    }
    for (int64_t j = 0; j < count; ++j) finish(sums.as<float>() + j * kTile, 0, (first + j) * kTileCols);
  });
}

// The same for a second operand that is used once, a matrix or MadeRows: packed in parts that stay in the shared
// cache.
template <class T, class Right, class Epilogue>
void multiply_in_parts(const Matrix<const T>& a, const Right& b, const Epilogue& epilogue, const TouchedList& touched) {
  const int64_t bytes = std::max<int64_t>(1, b.cols) * kTileCols * 4 / Units<T>::depth;
  const int64_t rows = std::max<int64_t>(1, kPackedBytes / bytes) * kTileCols;
  for (int64_t first = 0; first < b.rows; first += rows) {
    const Right part = b.some_rows(first, std::min(rows, b.rows - first));
    if (!multiply_apart(a, part, Finish(epilogue, touched, a.rows, first, part.rows)))
      multiply(a, Packed<T>(part), epilogue, touched, first);
  }
}

template <class T, class Epilogue>
void multiply(const Matrix<const T>& a, const Matrix<const T>& b, const Epilogue& epilogue,
              const TouchedList& touched = {}) {
  if (a.rows <= kTileRows) return multiply_few(a, b, Finish(epilogue, touched, a.rows, 0, b.rows));
  multiply_in_parts(a, b, epilogue, touched);
}

}  // namespace llmkern
