// dropout: y = residual + x m, where m is 0 with probability p and else 1 / (1 - p).  m is a function of
// the seed and of the place in x (philox.h), so that backward, dx = dy m, makes it again.

#include <algorithm>

#include "philox.h"
#include "simd.h"
#include "threads.h"

namespace llmkern {
namespace {

constexpr int64_t kBlock = 16;  // rows of one task

int lanes(int64_t i, int64_t end) { return static_cast<int>(std::min<int64_t>(W, end - i)); }

template <class T>
void drop_row(const T* x, const T* residual, T* y, int64_t width, int64_t row, const Dropout& dropout) {
  float factors[Dropout::kGroup];
  for (int64_t group = 0; group < width; group += Dropout::kGroup) {
    dropout.factors(row, group, factors);
    const int64_t end = std::min<int64_t>(width, group + Dropout::kGroup);
    for (int64_t i = group; i < end; i += W) {
      const int k = lanes(i, end);
      const Vec kept = load(x + i, k) * load(factors + (i - group));
      store(y + i, residual ? kept + load(residual + i, k) : kept, k);
    }
  }
}

// x begins at row `first` of a larger matrix.
void drop(const Tensor& x, const Tensor& residual, const Tensor& seed, double p, int64_t first, const Tensor& y) {
  if (!y) return;
  const int64_t rows = x.size[0], width = x.size[1];
  const Dropout dropout(seed, p);
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for((rows + kBlock - 1) / kBlock, false, [&](int64_t block) {
      for (int64_t n = block * kBlock; n < std::min(rows, (block + 1) * kBlock); ++n)
        drop_row(x.as<T>() + n * width, residual ? residual.as<T>() + n * width : nullptr, y.as<T>() + n * width,
                 width, first + n, dropout);
    });
  });
}

}  // namespace

void dropout_fwd(Tensor x, Tensor residual, Tensor seed, double p, int64_t first, Tensor y) {
  drop(x, residual, seed, p, first, y);
}

void dropout_bwd(Tensor dy, Tensor seed, double p, int64_t first, std::vector<bool>, Tensor dx) {
  drop(dy, {}, seed, p, first, dx);
}

KERNEL(dropout_fwd);
KERNEL(dropout_bwd);

}  // namespace llmkern
