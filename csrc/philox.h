// Random numbers that are a function of their place: Philox4x32 (Salmon et al. 2011, Parallel Random
// Numbers: As Easy as 1, 2, 3, sec. 4.3), seven rounds, the fewest that pass BigCrush (their table 2).
//
// The number of place (row, col) is word (col / 16) % 4 of the block with the counter
// (col / 64 · 16 + col % 16, row mod 2³², row / 2³², 0): 64 numbers of a row are 16 blocks, each word of
// which lies in one vector.  llmkern/ops/philox.py and kernels/philox.py make the same numbers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"
#include "tensor.h"

namespace llmkern {

class Dropout {
 public:
  static constexpr int kGroup = 64;  // numbers that are made together

  Dropout(const Tensor& seed, double p)
      : on_(p > 0 && seed), seed_(on_ ? static_cast<uint64_t>(*seed.as<int64_t>()) : 0),
        threshold_(static_cast<uint32_t>(std::min(p * 4294967296.0, 4294967295.0))),
        scale_(p < 1 ? static_cast<float>(1 / (1 - p)) : 0.0f) {}

  explicit operator bool() const { return on_; }

  // factors[j] for the places (row, col + j), j < 64: 1 / (1 - p) where the number keeps it, else 0;
  // col is a multiple of 64.
  void factors(int64_t row, int64_t col, float* factors) const {
    uint32_t words[4][kLanes];
    philox(static_cast<uint32_t>(col / kGroup * kLanes), static_cast<uint64_t>(row), words);
    for (int w = 0; w < 4; ++w)
      for (int i = 0; i < kLanes; ++i) factors[w * kLanes + i] = words[w][i] >= threshold_ ? scale_ : 0.0f;
  }

 private:
  static constexpr int kLanes = 16;

  void philox(uint32_t first, uint64_t row, uint32_t (*c)[kLanes]) const {
    for (int i = 0; i < kLanes; ++i) {
      c[0][i] = first + i;
      c[1][i] = static_cast<uint32_t>(row);
      c[2][i] = static_cast<uint32_t>(row >> 32);
      c[3][i] = 0;
    }
    uint32_t k0 = static_cast<uint32_t>(seed_), k1 = static_cast<uint32_t>(seed_ >> 32);
    for (int round = 0; round < 7; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
      for (int i = 0; i < kLanes; ++i) {
        const uint64_t a = uint64_t{0xD2511F53u} * c[0][i], b = uint64_t{0xCD9E8D57u} * c[2][i];
        c[0][i] = static_cast<uint32_t>(b >> 32) ^ c[1][i] ^ k0;
        c[2][i] = static_cast<uint32_t>(a >> 32) ^ c[3][i] ^ k1;
        c[1][i] = static_cast<uint32_t>(b);
        c[3][i] = static_cast<uint32_t>(a);
      }
  }

  bool on_;
  uint64_t seed_;
  uint32_t threshold_;
  float scale_;
};

}  // namespace llmkern
