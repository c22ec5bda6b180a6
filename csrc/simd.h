// The only file with intrinsics: a vector of floats of the width that this build's processor likes
// best.  `Vec` is a GCC vector, so + - * / and comparisons read as the formula; the functions here add
// what those lack.  Everything stored in bfloat16 or half is computed in float.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "tensor.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace llmkern {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float Vec __attribute__((vector_size(W * 4)));
typedef int32_t IntVec __attribute__((vector_size(W * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(W * 2)));
typedef uint64_t LongVec __attribute__((vector_size(W * 4)));  // W / 2 of 64 bits

#if defined(__AVX512BF16__)
constexpr bool has_bf16_dot = true;
#else
constexpr bool has_bf16_dot = false;
#endif

inline Vec set(float x) { return x - Vec{}; }  // x - 0 is x whatever x is; 0 + x costs an addition for -0
inline IntVec bits(Vec x) { return reinterpret_cast<IntVec>(x); }
inline Vec floats(IntVec x) { return reinterpret_cast<Vec>(x); }

// ---- bfloat16 and half ------------------------------------------------------------------------

// Round to nearest even; NaN stays NaN, denormals stay.
inline IntVec round_to_bf16(Vec x) {
  IntVec b = bits(x);
  IntVec rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  return (x == x ? rounded : IntVec{} + 0x7fc0) & 0xffff;
}

inline Vec widen(const bf16* p) {
#if defined(__AVX512F__)
  const IntVec wide = (IntVec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  const IntVec wide = (IntVec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  HalfVec h;
  std::memcpy(&h, p, sizeof h);
  const IntVec wide = __builtin_convertvector(h, IntVec);
#endif
  return floats(wide << 16);
}

inline void narrow(bf16* p, Vec x) {
#if defined(__AVX512BF16__)
  if (!_mm512_fpclass_ps_mask(x, 0x20)) {  // the instruction would flush denormals
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x));
    return;
  }
#endif
  HalfVec h = __builtin_convertvector(round_to_bf16(x), HalfVec);
  std::memcpy(p, &h, sizeof h);
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  uint32_t b = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &b, 4);
  return f;
}

#if defined(__AVX512F__)
inline Vec widen(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline void narrow(f16* p, Vec x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline float to_float(f16 x) { return _cvtsh_ss(x.bits); }
#elif defined(__AVX2__)
inline Vec widen(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline void narrow(f16* p, Vec x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline float to_float(f16 x) { return _cvtsh_ss(x.bits); }
#else
// Half to float by exponent arithmetic: shift the fields into place, then rescale by 2^112, which
// also makes half's denormals normal; infinities and NaN keep an all-ones exponent.
inline float to_float(f16 x) {
  uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16, b;
  float f;
  std::memcpy(&f, &magnitude, 4);
  f *= 0x1p112f;
  std::memcpy(&b, &f, 4);
  if (magnitude >= 0x0f800000u) b = magnitude | 0x7f800000u;
  b |= sign;
  std::memcpy(&f, &b, 4);
  return f;
}
inline f16 to_half(float x) {
  uint32_t b;
  std::memcpy(&b, &x, 4);
  const uint16_t sign = (b >> 16) & 0x8000;
  float a = std::fabs(x);
  if (!(a < 65520.0f)) return {static_cast<uint16_t>(sign | (x != x ? 0x7e00 : 0x7c00))};
  if (a < 0x1p-14f) return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(a * 0x1p24f)))};
  std::memcpy(&b, &a, 4);
  b += 0xfff + ((b >> 13) & 1);
  return {static_cast<uint16_t>(sign | ((b >> 13) - (112 << 10)))};
}
inline Vec widen(const f16* p) {
  Vec v;
  for (int i = 0; i < W; ++i) v[i] = to_float(p[i]);
  return v;
}
inline void narrow(f16* p, Vec x) {
  for (int i = 0; i < W; ++i) p[i] = to_half(x[i]);
}
#endif

// ---- load and store: all W lanes, or the first n with zeros behind --------------------------------

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec load(const bf16* p) { return widen(p); }
inline Vec load(const f16* p) { return widen(p); }
inline Vec load(const int8_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  Vec v;
  for (int i = 0; i < W; ++i) v[i] = p[i];
  return v;
#endif
}
inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }
inline void store(bf16* p, Vec x) { narrow(p, x); }
inline void store(f16* p, Vec x) { narrow(p, x); }

template <class T>
Vec load(const T* p, int n) {
  if (n >= W) return load(p);
  T buffer[W] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <class T>
void store(T* p, Vec x, int n) {
  if (n >= W) return store(p, x);
  T buffer[W];
  store(buffer, x);
  std::memcpy(p, buffer, n * sizeof(T));
}
#if defined(__AVX512F__)
template <>
inline Vec load(const float* p, int n) {
  return _mm512_maskz_loadu_ps(n >= W ? 0xffff : (1u << n) - 1, p);
}
template <>
inline void store(float* p, Vec x, int n) {
  _mm512_mask_storeu_ps(p, n >= W ? 0xffff : (1u << n) - 1, x);
}
#endif

// A vector of whatever there is, or the first `bytes` of one with zeros behind.
inline IntVec load_bits(const void* p) {
  IntVec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline IntVec load_bits(const void* p, size_t bytes) {
  IntVec v{};
  std::memcpy(&v, p, bytes);
  return v;
}

// p[0] in four lanes, p[1] in the next four, ..; the first n of them, zeros behind.
template <class T>
Vec load_each_four(const T* p, int n) {
  constexpr int kMost = W / 4;
  T few[W] = {};
  std::memcpy(few, p, std::min(n, kMost) * sizeof(T));
  const Vec v = load(few);
  Vec each;
  for (int i = 0; i < W; ++i) each[i] = v[i / 4];
  return each;
}
#if defined(__AVX512F__)
inline Vec spread_fours(__m128 four) {
  const __m512i from = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  return _mm512_permutexvar_ps(from, _mm512_castps128_ps512(four));
}
template <>
inline Vec load_each_four(const float* p, int n) {
  return spread_fours(_mm_maskz_loadu_ps((1u << n) - 1, p));
}
template <>
inline Vec load_each_four(const f16* p, int n) {
  return spread_fours(_mm_cvtph_ps(_mm_maskz_loadu_epi16((1u << n) - 1, p)));
}
template <>
inline Vec load_each_four(const bf16* p, int n) {
  const __m128i four = _mm_cvtepu16_epi32(_mm_maskz_loadu_epi16((1u << n) - 1, p));
  return spread_fours(_mm_castsi128_ps(_mm_slli_epi32(four, 16)));
}
#endif

// Stores that bypass the caches, and what must follow them on each thread; `p` is aligned to a vector.
inline void stream(float* p, Vec x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, x);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, x);
#else
  store(p, x);
#endif
}
inline void finish_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
// Whether an output of rows of `width` can be streamed, and is so large that no cache would keep it.
template <class T>
bool streams(const T* out, int64_t rows, int64_t width) {
  constexpr int64_t kCached = int64_t{32} << 20;
  return sizeof(T) == sizeof(float) && width % W == 0 && reinterpret_cast<uintptr_t>(out) % sizeof(Vec) == 0 &&
         rows * width * static_cast<int64_t>(sizeof(T)) > kCached;
}

// Round a float through T, as storing and loading it would.
template <class T>
Vec rounded(Vec x) {
  if constexpr (sizeof(T) == 4) return x;
  T buffer[W];
  store(buffer, x);
  return load(buffer);
}

// ---- arithmetic --------------------------------------------------------------------------------

// a * b + c
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// The larger; b where either is NaN, so a running maximum goes first and new values second.
inline Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
inline Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

inline Vec sqrt(Vec x) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#else
  for (int i = 0; i < W; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// Lane sums in one fixed tree, so that the result does not depend on the compiler's mood.
inline float sum(Vec x) {
  float lanes[W];
  store(lanes, x);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}
inline float max_of(Vec x) {
  float lanes[W];
  store(lanes, x);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}

// Lanes 0 .. n-1 of x, `otherwise` behind them.
inline Vec keep_first(Vec x, int n, float otherwise) {
  IntVec lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  return lane < n ? x : set(otherwise);
}

// ---- functions ---------------------------------------------------------------------------------

inline Vec round_to_int(Vec x) {
#if defined(__AVX512F__)
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Vec magic = set(0x1.8p23f);  // adding it pushes the fraction out; |x| < 2^22 here
  return (x + magic) - magic;
#endif
}

// p 2^n for a whole n.
inline Vec scale_by_power(Vec p, Vec n) {
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, n);
#else
  // 2^n in two factors, so that results that underflow become denormal instead of wrong
  const IntVec whole = __builtin_convertvector(n, IntVec), half = whole >> 1;
  return p * floats((half + 127) << 23) * floats((whole - half + 127) << 23);
#endif
}

// e^x to 1.5 ulp: x = n log 2 + r, |r| ≤ log(2)/2, e^r by its series to r^7; NaN stays NaN.
inline Vec exp(Vec x) {
  x = min(set(89.0f), max(set(-104.0f), x));
  const Vec n = round_to_int(x * 1.44269504088896f);
  Vec r = fma(n, set(-0.693145751953125f), x);  // log 2 in two parts, the first exact in n * part
  r = fma(n, set(-1.42860682030941723e-6f), r);
  Vec p = set(1.98412698e-4f);  // 1/7!
  p = fma(p, r, set(1.38888889e-3f));
  p = fma(p, r, set(8.33333333e-3f));
  p = fma(p, r, set(4.16666667e-2f));
  p = fma(p, r, set(1.66666667e-1f));
  p = fma(p, r, set(0.5f));
  p = fma(p, r * r, r) + 1.0f;
  return scale_by_power(p, n);
}

// 2^t for t ≤ 127 or NaN: t = n + r, 2^r by a polynomial from the highest power down to r, and 1.
template <size_t degree>
Vec exp2(Vec t, const float (&powers)[degree]) {
  t = max(set(-151.0f), t);
  const Vec n = round_to_int(t), r = t - n;
  Vec p = set(powers[0]);
#pragma GCC unroll 8
  for (size_t i = 1; i < degree; ++i) p = fma(p, r, set(powers[i]));
  return scale_by_power(fma(p, r, set(1.0f)), n);
}
// Fitted on [-1/2, 1/2] for least maximum error: 2e-9, and 3e-6 for what is rounded to bfloat16.
constexpr float kExp2[] = {1.53533618e-4f, 1.33988744e-3f, 9.61843736e-3f, 5.55033247e-2f, 0.240226479f, 0.693147203f};
constexpr float kExp2Short[] = {9.582853e-3f, 5.5906426e-2f, 0.24024099f, 0.6931242f};
inline Vec exp2(Vec t) { return exp2(t, kExp2); }

constexpr float kLog2E = 1.44269504088896f;

// e^x for a softmax, x ≤ 0 or NaN.  Relative error 2^-24 (2 + |x|): that of x, a rounded score.
inline Vec softmax_exp(Vec x) { return exp2(x * kLog2E); }
// e^(x - base) to 3e-6 and 2^-24 |base|, for what is rounded to bfloat16.
inline Vec softmax_exp_short(Vec x, Vec base) { return exp2(fma(x, set(kLog2E), base * -kLog2E), kExp2Short); }

// 1 / x for 2^-126 ≤ x ≤ 2^126, or NaN.
inline Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  const Vec y = _mm512_rcp14_ps(x);
  return fma(y, fma(-x, y, set(1.0f)), y);  // Newton's step: 2^-14 becomes 2^-24
#else
  return 1.0f / x;
#endif
}

// tanh to 2 ulp: near 0, where 1 - 2 / (e^2x + 1) loses digits, an odd polynomial (Moshier 1992, Cephes).
inline Vec tanh(Vec x) {
  const Vec a = floats(bits(x) & 0x7fffffff), z = x * x;
  Vec p = set(-5.70498872745e-3f);
  p = fma(p, z, set(2.06390887954e-2f));
  p = fma(p, z, set(-5.37397155531e-2f));
  p = fma(p, z, set(1.33314422036e-1f));
  p = fma(p, z, set(-3.33332819422e-1f));
  const Vec far = 1.0f - 2.0f / (exp(2.0f * a) + 1.0f);
  return a < 0.625f ? fma(p * z, x, x) : x < 0.0f ? -far : far;
}

// 1 / (1 + 2^-t); 2^-126 where it is less.  Absolute error 2^-24.
inline Vec sigmoid2(Vec t) { return reciprocal(1.0f + exp2(min(set(126.0f), -t))); }
inline Vec sigmoid(Vec x) { return sigmoid2(x * kLog2E); }

// ---- pairs of bfloat16 for the dot instruction -------------------------------------------------

#if defined(__AVX512BF16__)
// acc[i] + a[2i] b[2i] + a[2i+1] b[2i+1], in float; denormal factors count as zero
inline Vec dot(__m512bh a, __m512bh b, Vec acc) { return _mm512_dpbf16_ps(acc, a, b); }
inline __m512bh load_pairs(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline __m512bh broadcast_pair(const bf16* p) {
  int32_t pair;
  std::memcpy(&pair, p, 4);
  return (__m512bh)_mm512_set1_epi32(pair);
}
// The same where lanes of a Vec carry the pairs' bits.
inline Vec dot(Vec a, Vec b, Vec acc) { return dot((__m512bh)a, (__m512bh)b, acc); }
// Pairs of neighbours, (a0, a1) (a2, a3) .. (b0, b1) .., rounded to bfloat16.
inline Vec round_to_pairs(Vec a, Vec b) { return (Vec)_mm512_cvtne2ps_pbh(b, a); }
// The pairs (a0, b0) (a1, b1) .., rounded to bfloat16.
inline Vec round_to_zipped_pairs(Vec a, Vec b) {
  short order __attribute__((vector_size(64)));
  for (int i = 0; i < 32; ++i) order[i] = i / 2 + i % 2 * W;
  return (Vec)_mm512_permutexvar_epi16((__m512i)order, (__m512i)round_to_pairs(a, b));
}
inline __m512i zip(__m512i a, __m512i b, int first) {
  short order __attribute__((vector_size(64)));
  for (int i = 0; i < 32; ++i) order[i] = first + i / 2 + i % 2 * 32;
  return _mm512_permutex2var_epi16(a, (__m512i)order, b);
}
// The pairs (a0, b0) (a1, b1) .. of two vectors of bfloat16, their first halves or their second.
inline Vec zip_first(Vec a, Vec b) { return (Vec)zip((__m512i)a, (__m512i)b, 0); }
inline Vec zip_second(Vec a, Vec b) { return (Vec)zip((__m512i)a, (__m512i)b, W); }
#else
// never called, see has_bf16_dot
inline Vec dot(Vec, Vec, Vec acc) { return acc; }
inline Vec zip_first(Vec a, Vec) { return a; }
inline Vec zip_second(Vec a, Vec) { return a; }
inline Vec round_to_pairs(Vec, Vec) { return Vec{}; }
inline Vec round_to_zipped_pairs(Vec, Vec) { return Vec{}; }
#endif

// Bits of the pairs (first[i], second[i]) of two vectors that hold bfloat16 values.
inline Vec make_pairs(Vec first, Vec second) {
  return floats(((bits(first) >> 16) & 0xffff) | (bits(second) & static_cast<int32_t>(0xffff0000)));
}

// ---- whole numbers -------------------------------------------------------------------------------

// The 64-bit products of b and the low 32 bits of each lane.
inline LongVec multiply_low(LongVec a, uint32_t b) {
#if defined(__AVX512F__)
  return (LongVec)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (LongVec)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  return (a & 0xffffffffu) * uint64_t{b};
#endif
}

// W floats to the nearest whole numbers.
inline IntVec to_int(Vec x) { return __builtin_convertvector(round_to_int(x), IntVec); }

// W whole numbers of -128 .. 127 as bytes.
inline void store_bytes(int8_t* p, IntVec x) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)x));
#else
  for (int i = 0; i < W; ++i) p[i] = static_cast<int8_t>(x[i]);
#endif
}

inline int32_t sum(IntVec x) {
  int32_t total = 0;
  for (int i = 0; i < W; ++i) total += x[i];
  return total;
}
inline int32_t max_of(IntVec x) {
  int32_t most = x[0];
  for (int i = 1; i < W; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

// acc[i] + a[4i] b[0] + .. + a[4i+3] b[3]: bytes of a without sign, the four at b with.
#if defined(__AVX512VNNI__)
constexpr bool has_byte_dot = true;
inline IntVec dot_bytes(IntVec a, const int8_t* b, IntVec acc) {
  int32_t four;
  std::memcpy(&four, b, 4);
  return (IntVec)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, _mm512_set1_epi32(four));
}
// The same with four bytes of b for each lane.
inline IntVec dot_bytes(IntVec a, IntVec b, IntVec acc) {
  return (IntVec)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
}
#else
constexpr bool has_byte_dot = false;  // dot_bytes is never called
inline IntVec dot_bytes(IntVec, const int8_t*, IntVec acc) { return acc; }
inline IntVec dot_bytes(IntVec, IntVec, IntVec acc) { return acc; }
#endif

// ---- codes of four bits --------------------------------------------------------------------------

// W bytes as whole numbers.
inline IntVec load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return (IntVec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (IntVec)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  IntVec v;
  for (int i = 0; i < W; ++i) v[i] = p[i];
  return v;
#endif
}

// The first n of W bytes, zeros behind them.
inline IntVec load_bytes(const uint8_t* p, int n) {
  if (n >= W) return load_bytes(p);
  uint8_t buffer[W] = {};
  std::memcpy(buffer, p, n);
  return load_bytes(buffer);
}

// table[index] for the low three bits of each lane.
inline Vec lookup8(const float* table, IntVec index) {
#if defined(__AVX512F__)
  return _mm512_permutexvar_ps((__m512i)(index & 7), _mm512_castps256_ps512(_mm256_loadu_ps(table)));
#elif defined(__AVX2__)
  return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
#else
  Vec v;
  for (int i = 0; i < W; ++i) v[i] = table[index[i] & 7];
  return v;
#endif
}

// scale · c + offset for the low four bits c of each lane: looked up among all 16, where they fit a vector.
class Codes {
 public:
  Codes() = default;
#if defined(__AVX512F__)
  Codes(float scale, float offset) {
    Vec c;
    for (int i = 0; i < W; ++i) c[i] = static_cast<float>(i);
    table_ = fma(c, set(scale), set(offset));
  }
  Vec operator()(IntVec codes) const { return _mm512_permutexvar_ps((__m512i)codes, table_); }

 private:
  Vec table_;
#else
  Codes(float scale, float offset) : scale_(set(scale)), offset_(set(offset)) {}
  Vec operator()(IntVec codes) const { return fma(__builtin_convertvector(codes & 15, Vec), scale_, offset_); }

 private:
  Vec scale_, offset_;
#endif
};

// ---- shuffles within a vector --------------------------------------------------------------------

template <int... L>
Vec swap_neighbours(Vec x, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(x, x, (L ^ 1)...);
}
// Lanes 1, 0, 3, 2, ...
inline Vec swap_neighbours(Vec x) { return swap_neighbours(x, std::make_integer_sequence<int, W>{}); }

// ---- transposing W x W ---------------------------------------------------------------------------

// Swap the off-diagonal S x S blocks of rows a and b = a + S: bit S of the row number for that of the lane.
template <int S, int... L>
void swap_blocks(Vec& a, Vec& b, std::integer_sequence<int, L...>) {
  const Vec low = __builtin_shufflevector(a, b, ((L & S) ? W + L - S : L)...);
  b = __builtin_shufflevector(a, b, ((L & S) ? W + L : L + S)...);
  a = low;
}
template <int S = W / 2>
void transpose(Vec (&r)[W]) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & S)) swap_blocks<S>(r[i], r[i + S], std::make_integer_sequence<int, W>{});
  if constexpr (S > 1) transpose<S / 2>(r);
}

// Lane i of the result is the sum of the lanes of r[i]; r is used up.  Inlined, so that r stays in registers.
template <int S = W / 2>
__attribute__((always_inline)) inline Vec sum_of_each(Vec (&r)[W]) {
#pragma GCC unroll 8
  for (int i = 0; i < S; ++i) {
    swap_blocks<S>(r[i], r[i + S], std::make_integer_sequence<int, W>{});
    r[i] += r[i + S];
  }
  if constexpr (S > 1) return sum_of_each<S / 2>(r);
  return r[0];
}

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
inline void prefetch_to_write(void* p) { __builtin_prefetch(p, 1, 3); }
inline void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

// Calls body(T{}) with the C++ type of a floating dtype.
template <class Body>
void with_type(DType dtype, const Body& body) {
  if (dtype == DType::f32) return body(float{});
  if (dtype == DType::bf16) return body(bf16{});
  if (dtype == DType::f16) return body(f16{});
  throw std::invalid_argument("llmkern: a CPU kernel takes float32, bfloat16 or float16");
}

}  // namespace llmkern
