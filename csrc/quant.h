// A weight of 8 or 4 bits an element as the kernels of quant_linear see it.
#pragma once

#include <algorithm>

#include "gemv.h"
#include "pack.h"

namespace llmkern::quant {

constexpr int64_t kAheadBytes = 8192;  // of codes, asked for in time for the latency of memory; blocks as in gemv.h

struct Weight {
  const uint8_t* data;
  Tensor scales, mins;
  int64_t rows, depth, row_bytes, groups, blocks;
  bool nibbles, whole;  // whole: one scale a row, left to the row's sum, so that the codes stay exact

  Weight(const Tensor& q, const Tensor& scales, const Tensor& mins, int64_t depth, bool by_sum)
      : data(q.as<uint8_t>()),
        scales(scales),
        mins(mins),
        rows(q.size[0]),
        depth(depth),
        row_bytes(q.size[1]),
        groups(scales.size[1]),
        blocks(ceil_div(depth, kBlock)),
        nibbles(q.dtype == DType::u8),
        whole(by_sum && groups == 1 && !mins) {}

  int64_t width() const { return blocks * kBlock; }
  int64_t group_blocks() const { return groups == 1 ? blocks : blocks / groups; }
  // The scale of row sums `row` on.
  Vec factor(int64_t row, int n) const { return whole ? read(scales, row, n) : set(1.0f); }

  // The offset of a group with this scale, where there are no mins.
  template <class V>
  V offset(V scale) const {
    return nibbles ? -8.0f * scale : V{};
  }
  // Scales and offsets of all groups of a row, as floats.
  void affine(int64_t row, float* scale, float* offset) const {
    if (whole) {
      *scale = 1, *offset = this->offset(1.0f);
      return;
    }
    for (int64_t g = 0; g < groups; g += W) {
      const int n = static_cast<int>(std::min<int64_t>(W, groups - g));
      const Vec s = read(scales, row * groups + g, n);
      store(scale + g, s, n);
      store(offset + g, mins ? read(mins, row * groups + g, n) : this->offset(s), n);
    }
  }

 private:
  static Vec read(const Tensor& t, int64_t i, int n) {
    Vec v;
    with_type(t.dtype, [&](auto type) { v = load(t.as<decltype(type)>() + i, n); });
    return v;
  }
};

}  // namespace llmkern::quant
