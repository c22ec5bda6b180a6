// What a kernel sees of a torch tensor, and how it declares itself.  No pybind11, no torch.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace llmkern {

enum class DType : uint8_t { f32, bf16, f16, f64, i64, i32, u8, i8, boolean };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// A view of memory owned by Python.  `None` arrives as a tensor without data.
struct Tensor {
  static constexpr int max_dims = 6;
  void* data = nullptr;
  DType dtype = DType::f32;
  int dims = 0;
  int64_t size[max_dims] = {};
  int64_t stride[max_dims] = {};

  explicit operator bool() const { return data != nullptr; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  int64_t count() const {
    if (!data) return 0;
    int64_t n = 1;
    for (int i = 0; i < dims; ++i) n *= size[i];
    return n;
  }
  // of a tensor without gaps
  size_t bytes() const {
    const size_t each = dtype == DType::f32 || dtype == DType::i32 ? 4 : dtype == DType::f64 || dtype == DType::i64 ? 8
                        : dtype == DType::bf16 || dtype == DType::f16 ? 2 : 1;
    return static_cast<size_t>(count()) * each;
  }
};

// One argument as it comes from Python: tensor, None, int, float, bool, str, list of bool or of tensors.
struct Value {
  Tensor tensor;
  int64_t integer = 0;
  double real = 0;
  bool none = false;
  std::string text;
  std::vector<bool> flags;
  std::vector<Tensor> tensors;
};

// `Optional` int: an int argument that may be None.
struct OptionalInt {
  bool given = false;
  int64_t value = 0;
};

template <class T>
T get(const Value& v);
template <>
inline Tensor get(const Value& v) { return v.tensor; }
template <>
inline int64_t get(const Value& v) { return v.integer; }
template <>
inline double get(const Value& v) { return v.real; }
template <>
inline bool get(const Value& v) { return v.integer != 0; }
template <>
inline std::string get(const Value& v) { return v.text; }
template <>
inline std::vector<bool> get(const Value& v) { return v.flags; }
template <>
inline std::vector<Tensor> get(const Value& v) { return v.tensors; }
template <>
inline OptionalInt get(const Value& v) { return {!v.none, v.integer}; }

// A kernel by the name under which Python finds it, e.g. "layer_norm_fwd".
struct Kernel {
  const char* name;
  size_t arity;
  void (*call)(const Value*);
};

inline std::vector<Kernel>& kernels() {
  static std::vector<Kernel> all;
  return all;
}

template <auto F>
struct Caller;
template <class... Args, void (*F)(Args...)>
struct Caller<F> {
  template <size_t... I>
  static void spread(const Value* v, std::index_sequence<I...>) {
    F(get<std::decay_t<Args>>(v[I])...);
  }
  static void call(const Value* v) { spread(v, std::index_sequence_for<Args...>{}); }
  static constexpr size_t arity = sizeof...(Args);
};

// KERNEL(layer_norm_fwd) below the function makes it callable from Python: its arguments are those of
// the op's schema, then the op's outputs, already allocated.
#define KERNEL(f) \
  static const bool f##_registered = \
      (::llmkern::kernels().push_back({#f, ::llmkern::Caller<&f>::arity, &::llmkern::Caller<&f>::call}), true)

}  // namespace llmkern
