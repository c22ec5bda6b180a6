// Activations and their derivatives, by their formulas:
//   relu       max(u, 0)                relu2   max(u, 0)²            silu   u σ(u)
//   gelu       u Φ(u), Φ the normal distribution; Hendrycks, Gimpel 2016, arXiv:1606.08415, sec. 2
//   gelu_tanh  0.5 u (1 + tanh z) = u σ(2z),  z = √(2/π) (u + 0.044715 u³)
#pragma once

#include <string>

#include "simd.h"

namespace llmkern {

struct Activated {
  Vec value, slope;
};

struct Relu {
  static Vec value(Vec u) { return u < 0.0f ? Vec{} : u; }  // so that NaN stays
  static Activated both(Vec u) { return {value(u), u > 0.0f ? set(1.0f) : Vec{}}; }
};

struct Relu2 {
  static Vec value(Vec u) { return Relu::value(u) * Relu::value(u); }
  static Activated both(Vec u) { return {value(u), 2.0f * Relu::value(u)}; }
};

struct Silu {
  static Vec value(Vec u) { return u * sigmoid(u); }
  static Activated both(Vec u) {
    const Vec s = sigmoid(u);
    return {u * s, s * fma(u, 1.0f - s, set(1.0f))};
  }
};

struct Gelu {
  static Vec value(Vec u) { return u * normal(u).value; }
  static Activated both(Vec u) {
    const Activated phi = normal(u);
    return {u * phi.value, fma(u, phi.slope, phi.value)};
  }

 private:
  // Φ(u) and its density.  For a ≥ 0, Φ(-a) = e^(-a²/2) q(1 / (1 + 0.3 a)) with a polynomial q fitted for
  // least maximum relative error (1.5e-7 before rounding), and Φ(a) = 1 - Φ(-a).
  static Activated normal(Vec u) {
    const Vec a = min(set(1e30f), floats(bits(u) & 0x7fffffff));
    const Vec t = reciprocal(fma(a, set(0.3f), set(1.0f)));
    const Vec e = exp2(u * u * (-0.5f * kLog2E));
    Vec q = set(0.035675183f);
    q = fma(q, t, set(-0.15720471f));
    q = fma(q, t, set(0.206356178f));
    q = fma(q, t, set(-0.0536859769f));
    q = fma(q, t, set(0.12856279f));
    q = fma(q, t, set(0.099913163f));
    q = fma(q, t, set(0.120754005f));
    q = fma(q, t, set(0.119629296f));
    const Vec tail = e * (q * t);
    return {u < 0.0f ? tail : 1.0f - tail, 0.39894228f * e};  // 1 / √(2π)
  }
};

struct GeluTanh {
  static Vec value(Vec u) { return u * gate(u); }
  static Activated both(Vec u) {
    const Vec s = gate(u), dz = fma(u * u, set(3 * kTwice * 0.044715f), set(kTwice));  // of 2z
    return {u * s, s * fma(u * (1.0f - s), dz, set(1.0f))};
  }

 private:
  static constexpr float kTwice = 1.5957691f;  // 2 √(2/π)
  static Vec gate(Vec u) {
    return sigmoid2(u * fma(u * u, set(kTwice * kLog2E * 0.044715f), set(kTwice * kLog2E)));
  }
};

// Calls body(A{}) with the activation of that name.
template <class Body>
void with_activation(const std::string& name, const Body& body) {
  if (name == "relu") return body(Relu{});
  if (name == "relu2") return body(Relu2{});
  if (name == "silu") return body(Silu{});
  if (name == "gelu") return body(Gelu{});
  if (name == "gelu_tanh") return body(GeluTanh{});
  throw std::invalid_argument("llmkern: activation is '" + name +
                              "', expected relu, relu2, silu, gelu or gelu_tanh");
}

}  // namespace llmkern
