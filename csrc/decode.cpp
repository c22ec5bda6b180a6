// The op decode_attention: see decode_tasks.h.

#include "decode_tasks.h"

namespace llmkern {
namespace decode {
namespace {

template <class C>
void forward(const Problem& p, const Tensor& out, const Tensor& lse) {
  const Tasks<C> tasks(p);
  parallel_for(tasks.chunks(), true, [&](int64_t task) { tasks.run(p, task); });
  parallel_for(tasks.merges(), false, [&](int64_t task) { tasks.merge(p, task, out, lse); });
}

}  // namespace
}  // namespace decode

void decode_attention_fwd(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor key,
                          Tensor value, Tensor block_table, Tensor cos, Tensor sin, bool interleaved,
                          Tensor k_scale, Tensor v_scale, double scale, OptionalInt left, double softcap,
                          Tensor alibi_slopes, Tensor sinks, Tensor out, Tensor lse) {
  const int64_t dim = q.size[3], group = q.size[1] / k_cache.size[1];
  const decode::Problem problem{
      q, key, value, cache_seqlens, cos, sin, alibi_slopes, sinks,
      decode::Cache(k_cache, k_scale, block_table), decode::Cache(v_cache, v_scale, block_table),
      q.size[0], q.size[1], k_cache.size[1], group, q.size[2], dim, decode::ceil_div(dim, 2 * W) * 2 * W,
      group * q.size[2], interleaved, static_cast<float>(scale), static_cast<float>(softcap), left};
  problem.check();
  if (k_cache.dtype == DType::i8) return decode::forward<int8_t>(problem, out, lse);
  with_type(k_cache.dtype, [&](auto t) { decode::forward<decltype(t)>(problem, out, lse); });
}

KERNEL(decode_attention_fwd);

}  // namespace llmkern
