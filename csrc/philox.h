// Random numbers that are a function of their place: Philox4x32 (Salmon et al. 2011, Parallel Random
// Numbers: As Easy as 1, 2, 3, sec. 4.3), seven rounds, the fewest that pass BigCrush (their table 2).
//
// The number of place (row, col) is word (col / 16) % 4 of the block with the counter
// (col / 64 · 16 + col % 16, row mod 2³², row / 2³², 0): 64 numbers of a row are 16 blocks, each word of
// which lies in one vector.  llmkern/ops/philox.py and kernels/philox.py make the same numbers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "buffer.h"
#include "simd.h"
#include "tensor.h"
#include "threads.h"

namespace llmkern {

class Random {
 public:
  static constexpr int kGroup = 64;  // numbers that are made together

  explicit Random(const Tensor& seed) : on_(seed), seed_(seed ? static_cast<uint64_t>(*seed.as<int64_t>()) : 0) {}

  explicit operator bool() const { return on_; }

  // The numbers of the places (row, col + j), j < 64; col is a multiple of 64.
  void numbers(int64_t row, int64_t col, uint32_t* to) const {
    philox(static_cast<uint32_t>(col / kGroup * kLanes), static_cast<uint64_t>(row), to);
  }

 private:
  static constexpr int kLanes = 16;  // numbers of one word

  // Counters and words lie in the low halves of 64-bit lanes, as the multiplication wants them; what is
  // in the high halves is never looked at.
  void philox(uint32_t first, uint64_t row, uint32_t* words) const {
    constexpr int lanes = W / 2;
    for (int i = 0; i < kLanes; i += lanes) {
      LongVec c0 = LongVec{} + (first + i), c1 = LongVec{} + row, c2 = c1 >> 32, c3{};
      for (int j = 0; j < lanes; ++j) c0[j] += j;
      uint32_t k0 = static_cast<uint32_t>(seed_), k1 = static_cast<uint32_t>(seed_ >> 32);
      for (int round = 0; round < 7; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        const LongVec a = multiply_low(c0, 0xD2511F53u), b = multiply_low(c2, 0xCD9E8D57u);
        c0 = (b >> 32) ^ c1 ^ k0;
        c2 = (a >> 32) ^ c3 ^ k1;
        c1 = b;
        c3 = a;
      }
      keep_low(c0, words + i), keep_low(c1, words + kLanes + i);
      keep_low(c2, words + 2 * kLanes + i), keep_low(c3, words + 3 * kLanes + i);
    }
  }
  static void keep_low(LongVec c, uint32_t* words) {
    typedef uint32_t Low __attribute__((vector_size(W * 2)));
    const Low low = __builtin_convertvector(c, Low);
    std::memcpy(words, &low, sizeof low);
  }

  bool on_;
  uint64_t seed_;
};

class Dropout {
 public:
  static constexpr int kGroup = Random::kGroup;

  Dropout(const Tensor& seed, double p)
      : random_(p > 0 ? seed : Tensor{}),
        threshold_(static_cast<uint32_t>(std::min(p * 4294967296.0, 4294967295.0))),
        scale_(p < 1 ? static_cast<float>(1 / (1 - p)) : 0.0f) {}

  explicit operator bool() const { return static_cast<bool>(random_); }

  float scale() const { return scale_; }

  // Bit j: whether the place (row, col + j) is kept, j < 64; col is a multiple of 64.
  uint64_t keeps(int64_t row, int64_t col) const {
    uint32_t numbers[kGroup];
    random_.numbers(row, col, numbers);
    uint64_t bits = 0;
    for (int j = 0; j < kGroup; ++j) bits |= uint64_t{numbers[j] >= threshold_} << j;
    return bits;
  }

  // factors[j] for the places (row, col + j), j < 64: 1 / (1 - p) where the number keeps it, else 0;
  // col is a multiple of 64.
  void factors(int64_t row, int64_t col, float* factors) const {
    uint32_t numbers[kGroup];
    random_.numbers(row, col, numbers);
    for (int j = 0; j < kGroup; ++j) factors[j] = numbers[j] >= threshold_ ? scale_ : 0.0f;
  }

 private:
  Random random_;
  uint32_t threshold_;
  float scale_;
};

// The places of a matrix that dropout keeps, a bit each, for epilogues that come to them in any order.
class DropMask {
 public:
  // Row i of the mask is row `first + i` of the numbers.
  DropMask(const Dropout& dropout, int64_t first, int64_t rows, int64_t cols)
      : scale_(dropout.scale()), words_((cols + Dropout::kGroup - 1) / Dropout::kGroup),
        bits_(dropout ? rows * words_ * sizeof(uint64_t) : 0), on_(dropout) {
    if (!on_) return;
    parallel_for(rows, false, [&](int64_t i) {
      for (int64_t w = 0; w < words_; ++w)
        bits_.as<uint64_t>()[i * words_ + w] = dropout.keeps(first + i, w * Dropout::kGroup);
    });
  }
  // What dropout makes of the elements (row, col) on; col is a multiple of W.
  Vec operator()(Vec x, int64_t row, int64_t col) const {
    if (!on_) return x;
    IntVec lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    const uint64_t word = bits_.as<uint64_t>()[row * words_ + col / Dropout::kGroup];
    const IntVec keep = ((IntVec{} + static_cast<int32_t>(word >> (col % Dropout::kGroup))) >> lane) & 1;
    return x * (keep != 0 ? set(scale_) : Vec{});  // NaN stays NaN, as in torch
  }

 private:
  float scale_;
  int64_t words_;
  Buffer bits_;
  bool on_;
};

}  // namespace llmkern
