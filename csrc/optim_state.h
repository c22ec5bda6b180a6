// Optimizer states in 8 bits, block by block; llmkern/ops/optim_state.py has the formulas.
#pragma once

#include <algorithm>

#include "simd.h"

namespace llmkern {

constexpr int64_t kStateBlock = 256;  // elements with one scale

template <bool is_signed>
class StateCodes {
 public:
  // Elements of one block as numbers; `to` has room for whole vectors.
  static void decode(const uint8_t* codes, float scale, int64_t n, float* to) {
    const Decades& d = decades();
    for (int64_t i = 0; i < n; i += W) {
      const IntVec code = load_bytes(codes + i, lanes(i, n));
      const IntVec magnitude = is_signed ? code & 0x7f : code;
      const IntVec power = bits(__builtin_convertvector(magnitude, Vec)) & 0x7f800000;  // 2^i
      const Vec share = (__builtin_convertvector(magnitude, Vec) + 1.0f) * floats(0x7f000000 - power);
      const Vec value = fma(share, set(0.9f), set(-0.8f)) * lookup8(d.unit, (power >> 23) - 127) * scale;
      const Vec positive = magnitude > 0 ? value : set(scale * 0.0f);  // NaN if the scale is
      store(to + i, is_signed ? floats(bits(positive) ^ (code & 0x80) << 24) : positive);
    }
  }

  // The other way.  Returns the block's scale: NaN where an element is not finite.
  static float encode(const float* from, int64_t n, uint8_t* codes) {
    Vec top{}, poison{};
    for (int64_t i = 0; i < n; i += W) {
      const Vec x = load(from + i, lanes(i, n));
      top = max(top, magnitude(x));
      poison += x * 0.0f;
    }
    const float scale = max_of(top) + sum(poison), inverse = 1 / scale;
    const bool normal = scale >= 0x1p-126f;  // else the inverse overflows
    for (int64_t i = 0; i < n; i += W) {
      const Vec x = load(from + i, lanes(i, n));
      const Vec share = normal ? x * inverse : scale > 0 ? x / scale : Vec{};
      const CodeVec bytes = __builtin_convertvector(code(share), CodeVec);
      std::memcpy(codes + i, &bytes, lanes(i, n));
    }
    return scale;
  }

 private:
  static constexpr int kDecades = is_signed ? 7 : 8;
  typedef uint8_t CodeVec __attribute__((vector_size(W)));
  struct Decades {
    float unit[8], slope[8], border[8];
  };

  static int lanes(int64_t i, int64_t n) { return static_cast<int>(std::min<int64_t>(W, n - i)); }
  static Vec magnitude(Vec x) { return is_signed ? floats(bits(x) & 0x7fffffff) : x; }

  // The code nearest to each share.
  static IntVec code(Vec share) {
    const Decades& d = decades();
    const Vec x = magnitude(share);
    IntVec i{};  // the decade: how many borders are passed
    for (int k = 1; k < kDecades; ++k) i -= x > d.border[k];
    const Vec count = floats((i + 127) << 23);  // 2^i
    const Vec j = round_to_int(fma(x, lookup8(d.slope, i), count * (-1.0f / 9)));
    const IntVec found = __builtin_convertvector(min(count, max(set(1.0f), j)) + (count - 1.0f), IntVec);
    const IntVec c = found & (x > d.border[0]);
    return is_signed ? c | ((bits(share) >> 24) & 0x80 & (c > 0)) : c;
  }

  static const Decades& decades() {
    static const Decades all = [] {
      Decades d{};
      double unit = 1;
      for (int i = kDecades - 1; i >= 0; --i, unit /= 10) {
        const double count = 1 << i;
        d.unit[i] = static_cast<float>(unit);
        d.slope[i] = static_cast<float>(count / 0.9 / unit);
        d.border[i] = static_cast<float>(i ? unit / 10 * (1 + 4.5 / count) : is_signed ? unit / 2 : 0);
      }
      return d;
    }();
    return all;
  }
};

}  // namespace llmkern
