// embedding: y = weight[idx] + position_weight[position_ids], rounded once.
//
// Backward sorts the tokens by row, counting, and sums the gradients of each row in token order: the
// same bits for any thread count, and dweight is written once.

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "simd.h"
#include "threads.h"

namespace llmkern {
namespace {

constexpr int64_t kRows = 32;     // of one task
constexpr int kColumns = 8 * W;  // sums that stay in registers

int lanes(int64_t i, int64_t end) { return static_cast<int>(std::min<int64_t>(W, end - i)); }

void check(const Tensor& idx, int64_t rows, const char* what) {
  for (int64_t n = 0; n < idx.count(); ++n) {
    const int64_t i = idx.as<int64_t>()[n];
    if (i < 0 || i >= rows)
      throw std::out_of_range(std::string("embedding: ") + what + " " + std::to_string(i) +
                              " is out of range, expected 0 to " + std::to_string(rows - 1));
  }
}

template <class T>
void gather(const Tensor& idx, const Tensor& weight, const Tensor& position_weight, const Tensor& position_ids,
            const Tensor& y) {
  const int64_t tokens = y.size[0], width = y.size[1];
  parallel_for((tokens + kRows - 1) / kRows, false, [&](int64_t task) {
    for (int64_t n = task * kRows; n < std::min(tokens, (task + 1) * kRows); ++n) {
      const T* row = weight.as<T>() + idx.as<int64_t>()[n] * width;
      T* out = y.as<T>() + n * width;
      if (!position_weight) {
        std::memcpy(out, row, width * sizeof(T));
        continue;
      }
      const T* place = position_weight.as<T>() + position_ids.as<int64_t>()[n] * width;
      for (int64_t i = 0; i < width; i += W) {
        const int k = lanes(i, width);
        store(out + i, load(row + i, k) + load(place + i, k), k);
      }
    }
  });
}

// Tokens in the order of their rows: those of row r are order[start[r]] .. order[start[r + 1] - 1].
struct ByRow {
  std::vector<int64_t> start, order;

  ByRow(const Tensor& idx, int64_t rows) : start(rows + 1), order(idx.count()) {
    const int64_t* row = idx.as<int64_t>();
    const int64_t tokens = idx.count();
    for (int64_t n = 0; n < tokens; ++n) ++start[row[n] + 1];
    for (int64_t r = 0; r < rows; ++r) start[r + 1] += start[r];
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t n = 0; n < tokens; ++n) order[next[row[n]]++] = n;
  }
};

// The sum of the gradients of `count` tokens; 0 of none.
template <class T>
void sum_tokens(const T* dy, int64_t width, const int64_t* tokens, int64_t count, T* out) {
  for (int64_t column = 0; column < width; column += kColumns) {
    const int64_t end = std::min(width, column + kColumns);
    Vec total[kColumns / W] = {};
    for (int64_t t = 0; t < count; ++t) {
      const T* row = dy + tokens[t] * width;
      for (int64_t i = column; i < end; i += W) total[(i - column) / W] += load(row + i, lanes(i, end));
    }
    for (int64_t i = column; i < end; i += W) store(out + i, total[(i - column) / W], lanes(i, end));
  }
}

void scatter(const Tensor& dy, const Tensor& idx, const char* what, const OptionalInt& padding_idx,
             const Tensor& dweight) {
  if (!dweight) return;
  const int64_t rows = dweight.size[0], width = dweight.size[1];
  check(idx, rows, what);
  const ByRow by_row(idx, rows);
  with_type(dweight.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for((rows + kRows - 1) / kRows, true, [&](int64_t task) {
      for (int64_t r = task * kRows; r < std::min(rows, (task + 1) * kRows); ++r) {
        const bool padding = padding_idx.given && padding_idx.value == r;
        const int64_t first = by_row.start[r], count = padding ? 0 : by_row.start[r + 1] - first;
        sum_tokens(dy.as<T>(), width, by_row.order.data() + first, count, dweight.as<T>() + r * width);
      }
    });
  });
}

}  // namespace

void embedding_fwd(Tensor idx, Tensor weight, Tensor position_weight, Tensor position_ids, OptionalInt,
                   Tensor y) {
  check(idx, weight.size[0], "index");
  if (position_weight) check(position_ids, position_weight.size[0], "position");
  if (y) with_type(y.dtype, [&](auto t) { gather<decltype(t)>(idx, weight, position_weight, position_ids, y); });
}

void embedding_bwd(Tensor dy, Tensor idx, Tensor position_ids, int64_t, int64_t, OptionalInt padding_idx,
                   std::vector<bool>, Tensor dweight, Tensor dposition_weight) {
  scatter(dy, idx, "index", padding_idx, dweight);
  scatter(dy, position_ids, "position", {}, dposition_weight);
}

KERNEL(embedding_fwd);
KERNEL(embedding_bwd);

}  // namespace llmkern
