// What this processor can do at best: multiply-adds that never leave the registers, and memory read
// and copied in one stream.  Benchmarks hold every kernel against these (benchmarks/ceilings.py).

#include "simd.h"
#include "threads.h"

namespace llmkern {
namespace {

constexpr int kChains = 12;  // independent sums: enough to hide the latency, few enough for 16 registers

// Runs step() on every chain of every thread; the sum of all lanes goes to result[0], so that the
// compiler cannot drop the work, and the floating-point operations done to result[1].
template <class Step>
void run_chains(int64_t iterations, int flops_per_lane, const Tensor& result, const Step& step) {
  const int64_t workers = threads();
  std::vector<float> sums(workers);
  parallel_for(workers, false, [&](int64_t worker) {
    Vec chain[kChains];
    for (int k = 0; k < kChains; ++k) chain[k] = set(1.0f + k);
    for (int64_t i = 0; i < iterations; ++i)
      for (int k = 0; k < kChains; ++k) chain[k] = step(chain[k]);
    for (int k = 1; k < kChains; ++k) chain[0] += chain[k];
    sums[worker] = sum(chain[0]);
  });
  double total = 0;
  for (float s : sums) total += s;
  result.as<double>()[0] = total;
  result.as<double>()[1] = static_cast<double>(workers) * iterations * kChains * W * flops_per_lane;
}

}  // namespace

// result: (2,) float64, see run_chains.
void peak_fma(int64_t iterations, Tensor result) {
  const Vec a = set(0.9f), b = set(0.1f);  // c -> 0.9 c + 0.1 tends to 1: no denormals
  run_chains(iterations, 2, result, [&](Vec c) { return fma(c, a, b); });
}

// The same with the dot instruction for pairs of bfloat16; 0 operations where there is none.
void peak_bf16_dot(int64_t iterations, Tensor result) {
#if defined(__AVX512BF16__)
  bf16 pairs[2 * W];
  for (bf16& x : pairs) x.bits = 0x3c00;  // 2^-7
  const auto a = load_pairs(pairs);
  run_chains(iterations, 4, result, [&](Vec c) { return dot(a, a, c); });
#else
  (void)iterations;
  result.as<double>()[0] = result.as<double>()[1] = 0;
#endif
}

// Reads `from`, float32 (n,), `times` times over; every thread its own part.
void stream_read(Tensor from, int64_t times, Tensor result) {
  const int64_t workers = threads();
  std::vector<float> sums(workers);
  parallel_for(workers, false, [&](int64_t worker) {
    const auto [first, last] = share_of(from.size[0], worker, workers);
    Vec s[8] = {};
    for (int64_t t = 0; t < times; ++t)
      for (int64_t i = first; i + 8 * W <= last; i += 8 * W)
        for (int k = 0; k < 8; ++k) s[k] += load(from.as<float>() + i + k * W);
    for (int k = 1; k < 8; ++k) s[0] += s[k];
    sums[worker] = sum(s[0]);
  });
  double total = 0;
  for (float s : sums) total += s;
  result.as<double>()[0] = total;
}

// Copies `from` to `to`, float32 (n,), `times` times over; memcpy bypasses the cache for long copies.
void stream_copy(Tensor from, int64_t times, Tensor to) {
  const int64_t workers = threads();
  parallel_for(workers, false, [&](int64_t worker) {
    const auto [first, last] = share_of(from.size[0], worker, workers);
    for (int64_t t = 0; t < times; ++t)
      std::memcpy(to.as<float>() + first, from.as<float>() + first, (last - first) * sizeof(float));
  });
}

KERNEL(peak_fma);
KERNEL(peak_bf16_dot);
KERNEL(stream_read);
KERNEL(stream_copy);

}  // namespace llmkern
