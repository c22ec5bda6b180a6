// rope: pairs (a, b) of a head's elements rotated by the angle of the token's position,
//
//   (y[a], y[b]) = (x[a] cos - x[b] sin, x[b] cos + x[a] sin)
//
// with a = i, b = i + pairs, or interleaved a = 2i, b = 2i + 1.  A task takes some tokens, lays out
// their cosines and sines once, and goes over all heads of query and key: memory is read and written
// once.  Backward is the rotation by the negative angle.  In place the outputs are the inputs.

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "buffer.h"
#include "simd.h"
#include "threads.h"

namespace llmkern {
namespace {

constexpr int64_t kTokens = 16;  // of one task

int lanes(int64_t i, int64_t end) { return static_cast<int>(std::min<int64_t>(W, end - i)); }

// The tables, and which of their rows a token takes.
struct Angles {
  const Tensor &cos, &sin, &position_ids;
  bool interleaved;
  float sign;  // of the angle

  int64_t pairs() const { return cos.size[1]; }
  int64_t width() const { return interleaved ? 2 * pairs() : pairs(); }
  int64_t position(int64_t b, int64_t s) const {
    if (!position_ids) return s;
    return position_ids.as<int64_t>()[(position_ids.size[0] > 1 ? b : 0) * position_ids.stride[0] +
                                      s * position_ids.stride[1]];
  }
  // The factors of a token's row: of x into c, of x's partner into s; interleaved both twice, with signs.
  void lay_out(int64_t position, float* c, float* s) const {
    const float *from_c = cos.as<float>() + position * pairs(), *from_s = sin.as<float>() + position * pairs();
    for (int64_t i = 0; i < pairs(); ++i) {
      if (interleaved) {
        c[2 * i] = c[2 * i + 1] = from_c[i];
        s[2 * i] = -sign * from_s[i];
        s[2 * i + 1] = sign * from_s[i];
      } else {
        c[i] = from_c[i];
        s[i] = sign * from_s[i];
      }
    }
  }
  void check() const {
    if (!position_ids) return;
    for (int64_t b = 0; b < position_ids.size[0]; ++b)
      for (int64_t s = 0; s < position_ids.size[1]; ++s) {
        const int64_t p = position(b, s);
        if (p < 0 || p >= cos.size[0])
          throw std::out_of_range("rope: position " + std::to_string(p) + " is out of range, expected 0 to " +
                                  std::to_string(cos.size[0] - 1));
      }
  }
};

template <class T>
void rotate_head(const T* x, T* y, const float* c, const float* s, const Angles& angles, int64_t dim) {
  const int64_t pairs = angles.pairs(), width = angles.width();
  for (int64_t i = 0; i < width; i += W) {
    const int k = lanes(i, width);
    const Vec a = load(x + i, k), cos = load(c + i, k), sin = load(s + i, k);
    if (angles.interleaved) {
      store(y + i, fma(a, cos, swap_neighbours(a) * sin), k);
    } else {
      const Vec b = load(x + pairs + i, k);
      store(y + i, fma(a, cos, -(b * sin)), k);
      store(y + pairs + i, fma(b, cos, a * sin), k);
    }
  }
  if (x != y && dim > 2 * pairs) std::memcpy(y + 2 * pairs, x + 2 * pairs, (dim - 2 * pairs) * sizeof(T));
}

// All heads of the tokens [first, last) of batch b; the dimension that is inner in memory is inner here.
template <class T>
void rotate_tokens(const Tensor& x, const Tensor& y, int64_t b, int64_t first, int64_t last, const float* c,
                   const float* s, const Angles& angles) {
  const int64_t heads = x.size[1], tokens = last - first, width = angles.width();
  const auto rotate = [&](int64_t h, int64_t t) {
    const int64_t token = first + t;
    rotate_head(x.as<T>() + b * x.stride[0] + h * x.stride[1] + token * x.stride[2],
                y.as<T>() + b * y.stride[0] + h * y.stride[1] + token * y.stride[2], c + t * width,
                s + t * width, angles, x.size[3]);
  };
  if (y.stride[1] < y.stride[2]) {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t h = 0; h < heads; ++h) rotate(h, t);
  } else {
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t t = 0; t < tokens; ++t) rotate(h, t);
  }
}

void rotate(const Tensor& query, const Tensor& key, const Angles& angles, const Tensor& query_out,
            const Tensor& key_out) {
  angles.check();
  const Tensor& any = query_out ? query_out : key_out;
  if (!any) return;
  const int64_t length = any.size[2], blocks = (length + kTokens - 1) / kTokens, width = angles.width();
  with_type(any.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(any.size[0] * blocks, false, [&](int64_t task) {
      const int64_t b = task / blocks, first = task % blocks * kTokens;
      const int64_t last = std::min(length, first + kTokens);
      const Buffer factors(2 * kTokens * width * sizeof(float));
      float *c = factors.as<float>(), *s = c + kTokens * width;
      for (int64_t t = first; t < last; ++t)
        angles.lay_out(angles.position(b, t), c + (t - first) * width, s + (t - first) * width);
      if (query_out) rotate_tokens<T>(query, query_out, b, first, last, c, s, angles);
      if (key_out) rotate_tokens<T>(key, key_out, b, first, last, c, s, angles);
    });
  });
}

}  // namespace

void rope_fwd(Tensor query, Tensor key, Tensor cos, Tensor sin, Tensor position_ids, bool interleaved,
              Tensor query_out, Tensor key_out) {
  rotate(query, key, {cos, sin, position_ids, interleaved, 1}, query_out, key_out);
}

void rope_bwd(Tensor dquery_out, Tensor dkey_out, Tensor cos, Tensor sin, Tensor position_ids,
              bool interleaved, std::vector<bool>, Tensor dquery, Tensor dkey) {
  rotate(dquery_out, dkey_out, {cos, sin, position_ids, interleaved, -1}, dquery, dkey);
}

void rope_inplace_fwd(Tensor query, Tensor key, Tensor cos, Tensor sin, Tensor position_ids,
                      bool interleaved) {
  rotate(query, key, {cos, sin, position_ids, interleaved, 1}, query, key);
}

KERNEL(rope_fwd);
KERNEL(rope_bwd);
KERNEL(rope_inplace_fwd);

}  // namespace llmkern
