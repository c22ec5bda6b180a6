// Products of a few rows of x with a weight that each step of generation reads once:  y = x Wᵀ.
//
// Memory is the limit, so a weight is laid out once in the order in which it is read, W rows (lanes) at a
// time, codes and their scales in one stream, and sums of W rows grow beside each other without one
// horizontal addition.
//
// Codes of 4 and 8 bits meet x as whole numbers where the processor multiplies bytes.  Of each 32 neighbours of x
// the largest fixes a power of two by which all become whole numbers of 24 bits, and these are three digits
// of 8 bits with sign:  x = 2^e (65536 a + 256 b + c).  A block's three sums of codes times digits are exact, so
// the only rounding that floats do not have is that of x to 2^-23 of its block's largest, half an ulp of that.
#pragma once

#include <algorithm>
#include <memory>

#include "arena.h"
#include "buffer.h"
#include "simd.h"

namespace llmkern {

constexpr int kBlock = 32;       // neighbours of x that share a power of two
constexpr int kDigits = 3;       // of x, 8 bits each
constexpr int64_t kMostRows = 8;  // of x

// A block of x for products with codes.
struct alignas(64) DigitBlock {
  int8_t digits[kDigits][kBlock];  // the least first
  int32_t sums[kDigits];           // of the digits
  float scale;                     // 2^e; NaN where x has NaN or infinity
  float sum;                       // of x
};

// Rows of x: floats with zeros up to a whole block, and their digits once `digitise` was called.
class Activations {
 public:
  const int64_t rows, blocks;

  Activations(int64_t rows, int64_t depth)
      : rows(rows),
        blocks((depth + kBlock - 1) / kBlock),
        floats_(rows * width() * sizeof(float)),
        digits_(rows * blocks * sizeof(DigitBlock)) {
    std::fill_n(floats_.as<float>(), rows * width(), 0.0f);
  }
  int64_t width() const { return blocks * kBlock; }
  float* row(int64_t m) const { return floats_.as<float>() + m * width(); }
  const DigitBlock* digits(int64_t m) const { return digits_.as<DigitBlock>() + m * blocks; }
  void digitise() const;

 private:
  Buffer floats_, digits_;
};

// A weight (rows, depth).
class Gemv {
 public:
  const int64_t rows, depth;

  Gemv(int64_t rows, int64_t depth) : rows(rows), depth(depth) {}
  virtual ~Gemv() = default;
  // sums[m] = x[m] · rows W tile .. W tile + W - 1 of the weight, a row in each lane; what stands in lanes
  // behind the last row is anything.
  virtual void multiply(const Activations& x, int64_t tile, Vec* sums) const = 0;
  int64_t tiles() const { return (rows + W - 1) / W; }
  // Asks for the beginning of a tile, before a wait for something else.
  void ask(int64_t tile) const {
    for (int64_t i = 0; i < kEarly; i += 64) prefetch_l2(static_cast<const char*>(begin(tile)) + i);
  }

 private:
  static constexpr int64_t kEarly = 4096;  // bytes, of the 1 MiB of a second cache
  virtual const void* begin(int64_t tile) const = 0;
};

// Of a dense weight, which is not copied and must stay where it is; or of codes with scales and mins as
// in quant.cpp, which are laid out anew in `arena`.
std::unique_ptr<Gemv> make_gemv(const Tensor& weight, const Tensor& scales, const Tensor& mins, Arena& arena);

// Calls body(m, M{}) for 4, 2 and 1 rows of x from m on.
template <class Body>
void few_rows(int64_t rows, const Body& body) {
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) body(m, std::integral_constant<int, 4>{});
  if (m + 2 <= rows) body(m, std::integral_constant<int, 2>{}), m += 2;
  if (m < rows) body(m, std::integral_constant<int, 1>{});
}

}  // namespace llmkern
