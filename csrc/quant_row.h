// One row of x and codes of 4 bits, multiplied as whole numbers where the processor multiplies bytes.
//
// In floats 32 codes take seven vector operations and four multiply-adds, longer than memory needs to bring
// their 18 bytes.  Here 128 of them, four blocks, meet x as two vectors of bytes: the low halves, and the high
// ones, each with the three digits of x that gemv.h explains.  Lanes 4 b .. 4 b + 3 hold sums of block b, so one
// vector of scales serves all four: some twenty operations for 128 codes.
#pragma once

#include "quant.h"
#include "threads.h"

namespace llmkern::quant {

constexpr int kFour = 4;  // blocks of a vector of codes: 64 bytes with AVX-512, which has the instruction

// Four blocks of x in the order of the codes.
struct alignas(64) FourBlocks {
  int8_t low[kDigits][kFour * kBlock / 2], high[kDigits][kFour * kBlock / 2];
  int32_t start[kDigits][W];  // where sums begin: codes count from 8, or from 0 with mins
  float scale[W], sum[W];     // of each lane's block: 2^e, and its x, in the first of its lanes
};

// x as digits, with zeros behind the last block.
class DigitRow {
 public:
  DigitRow(const float* x, int64_t depth, bool mins)
      : size_(ceil_div(ceil_div(depth, kBlock), kFour)), buffer_(size_ * sizeof(FourBlocks)) {
    std::memset(buffer_.as<char>(), 0, size_ * sizeof(FourBlocks));
    const Activations row(1, depth);
    std::copy_n(x, depth, row.row(0));
    row.digitise();
    for (int64_t b = 0; b < row.blocks; ++b)
      put(row.digits(0)[b], mins ? 0 : 8, b % kFour, buffer_.as<FourBlocks>()[b / kFour]);
  }
  int64_t size() const { return size_; }
  const FourBlocks& operator[](int64_t i) const { return buffer_.as<FourBlocks>()[i]; }

 private:
  static void put(const DigitBlock& from, int zero, int64_t b, FourBlocks& to) {
    constexpr int kHalf = kBlock / 2, kLanes = kHalf / 4;
    for (int d = 0; d < kDigits; ++d) {
      std::memcpy(to.low[d] + b * kHalf, from.digits[d], kHalf);
      std::memcpy(to.high[d] + b * kHalf, from.digits[d] + kHalf, kHalf);
      for (int i = 0; i < kHalf; ++i)
        to.start[d][b * kLanes + i / 4] -= zero * (from.digits[d][i] + from.digits[d][kHalf + i]);
    }
    std::fill_n(to.scale + b * kLanes, kLanes, from.scale);
    to.sum[b * kLanes] = from.sum;
  }
  int64_t size_;
  Buffer buffer_;
};

// Whether the lanes of a vector of codes have one scale, or each block its own.
inline bool takes_digits(const Weight& w) {
  return has_byte_dot && w.nibbles && (w.groups == 1 || w.group_blocks() == 1 || w.group_blocks() % kFour == 0);
}

// sums[r] = x · weight row first + r, each lane a part of it.  S: the type of scales.  Each: every block has its
// own; else a group's sums are scaled at its end, those of a whole row not here but in the epilogue.
template <class S, bool each, bool mins, int R>
[[gnu::noinline]] void dot_rows(const DigitRow& x, const Weight& weight, int64_t first, Vec* sums) {
  constexpr int kBytes = sizeof(IntVec);
  const int64_t stride = weight.row_bytes, ahead = ceil_div(kAheadBytes, R * stride) * R * stride;
  const uint8_t* codes = weight.data + first * stride;
  const S* scales = weight.scales.as<S>() + first * weight.groups;
  const S* offsets = mins ? weight.mins.as<S>() + first * weight.groups : nullptr;
  Vec total[R] = {}, part[R] = {}, x_sum{};
  const auto step = [&](int64_t i, int n) __attribute__((always_inline)) {
    const FourBlocks& in = x[i];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const uint8_t* from = codes + r * stride + i * kBytes;
      const IntVec both = n == kFour ? load_bits(from) : load_bits(from, n * kBytes / kFour);
      const IntVec low = both & 0x0f0f0f0f, high = (both >> 4) & 0x0f0f0f0f;
      prefetch_l2(from + ahead);
      IntVec digit[kDigits];
#pragma GCC unroll 3
      for (int d = 0; d < kDigits; ++d)
        digit[d] = dot_bytes(high, load_bits(in.high[d]),
                             dot_bytes(low, load_bits(in.low[d]), load_bits(in.start[d])));
      const Vec upper = __builtin_convertvector((digit[2] << 8) + digit[1], Vec);
      const Vec exact = fma(upper, set(256.0f), __builtin_convertvector(digit[0], Vec));
      if constexpr (each) {
        const int64_t at = r * weight.groups + i * kFour;
        total[r] = fma(exact * load(in.scale), load_each_four(scales + at, n), total[r]);
        if (mins) total[r] = fma(load(in.sum), load_each_four(offsets + at, n), total[r]);
      } else {
        part[r] = fma(exact, load(in.scale), part[r]);
      }
    }
    if (mins && !each) x_sum += load(in.sum);
  };
  const int64_t whole = weight.blocks / kFour, rest = weight.blocks % kFour;
  const int64_t groups = each ? 1 : weight.groups, group = whole / groups;  // more than one have no rest
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t i = g * group; i < (g + 1) * group; ++i) step(i, kFour);
    if (rest) step(whole, static_cast<int>(rest));
    if (each) break;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      total[r] = weight.whole ? part[r] : fma(part[r], set(to_float(scales[r * groups + g])), total[r]);
      if (mins) total[r] = fma(x_sum, set(to_float(offsets[r * groups + g])), total[r]);
      part[r] = Vec{};
    }
    x_sum = Vec{};
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) sums[r] = total[r];
}

// epilogue(0, col, sums, n) as in gemm.h.
template <class Epilogue>
void multiply_row(const DigitRow& x, const Weight& weight, const Epilogue& epilogue) {
  constexpr int64_t kTiles = 4;  // of W rows, a task
  const auto run = [&](auto type, auto each, auto mins) {
    using S = decltype(type);
    parallel_for(ceil_div(weight.rows, kTiles * W), false, [&](int64_t task) {
      const int64_t end = std::min(weight.rows, (task + 1) * kTiles * W);
      for (int64_t col = task * kTiles * W; col < end; col += W) {
        const int n = static_cast<int>(std::min<int64_t>(W, end - col));
        Vec sums[W] = {};
        int i = 0;
        for (; i + 4 <= n; i += 4) dot_rows<S, each(), mins(), 4>(x, weight, col + i, sums + i);
        for (; i < n; ++i) dot_rows<S, each(), mins(), 1>(x, weight, col + i, sums + i);
        epilogue(0, col, sum_of_each(sums), n);
      }
    });
  };
  const auto with_flags = [&](auto type, auto each) {
    weight.mins ? run(type, each, std::true_type{}) : run(type, each, std::false_type{});
  };
  with_type(weight.scales.dtype, [&](auto type) {
    weight.groups > 1 && weight.group_blocks() == 1 ? with_flags(type, std::true_type{})
                                                    : with_flags(type, std::false_type{});
  });
}

}  // namespace llmkern::quant
