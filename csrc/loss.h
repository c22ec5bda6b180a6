// What the cross-entropies share: class weights, and targets held to their range.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>

#include "simd.h"

namespace llmkern {

inline int lanes(int64_t i, int64_t end) { return static_cast<int>(std::min<int64_t>(W, end - i)); }

// w[c], or 1 without class weights, in the dtype of the logits or float.
template <class T>
struct ClassWeight {
  const T* narrow;
  const float* wide;
  explicit ClassWeight(const Tensor& t)
      : narrow(t && t.dtype != DType::f32 ? t.as<T>() : nullptr),
        wide(t && t.dtype == DType::f32 ? t.as<float>() : nullptr) {}
  Vec operator()(int64_t i, int n) const {
    return wide ? load(wide + i, n) : narrow ? load(narrow + i, n) : set(1.0f);
  }
  float operator()(int64_t c) const { return wide ? wide[c] : narrow ? to_float(narrow[c]) : 1.0f; }
  // Those from class `first` on.
  ClassWeight from(int64_t first) const {
    ClassWeight moved = *this;
    if (narrow) moved.narrow += first;
    if (wide) moved.wide += first;
    return moved;
  }
  float total(int64_t classes) const {
    if (!wide && !narrow) return static_cast<float>(classes);
    double s = 0;
    for (int64_t c = 0; c < classes; ++c) s += (*this)(c);
    return static_cast<float>(s);
  }
};

inline void check_targets(const std::string& function, const Tensor& target, int64_t classes,
                          int64_t ignore_index) {
  const int64_t* t = target.as<int64_t>();
  const int64_t step = target.stride[0];
  for (int64_t n = 0; n < target.size[0]; ++n)
    if (t[n * step] != ignore_index && (t[n * step] < 0 || t[n * step] >= classes))
      throw std::out_of_range(function + ": target " + std::to_string(t[n * step]) +
                              " is out of range, expected 0 to " + std::to_string(classes - 1) +
                              " or ignore_index " + std::to_string(ignore_index));
}

}  // namespace llmkern
