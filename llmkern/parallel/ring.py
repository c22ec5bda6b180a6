"""Context parallelism: each process has a part of every sequence, and keys and values go round a ring.

Each process has two pieces, as far from the middle as from the ends, so that all have as many keys to see.

Source: Liu et al. 2023, Ring Attention, arXiv:2310.01889, section 3; of the pieces Grattafiori et al. 2024,
Llama 3, arXiv:2407.21783, section 3.3.2; of backward from the log-sum-exp Dao 2023, arXiv:2307.08691.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..ops import OPS
from ..ops.op import autocast
from ..ops.philox import new_seed

NEEDS = [True, True, True, False, False]  # gradients of q, k and v


def positions(length: int, mesh: DeviceMesh) -> Tensor:
    """The places (T / n,) in sequences of T tokens that process r has: pieces r and 2 n - 1 - r of 2 n."""
    n, r = mesh.size(), mesh.get_local_rank()
    if n == 1:
        return torch.arange(length)
    pieces = torch.arange(length).chunk(2 * n)
    return torch.cat((pieces[r], pieces[2 * n - 1 - r]))


def attend_in(attention: nn.Module, mesh: DeviceMesh) -> None:
    """Have a causal attention module attend over the whole sequence."""
    rate = getattr(attention, "dropout", 0.0)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return RingAttention.apply(*autocast(q, k, v), mesh, rate if attention.training else 0.0)

    attention.attend = attend


class Ring:
    """Tensors on their way to the next process, while this one works.

    Args:
        mesh: of one dimension.
        tensors: what this process has first.
    """

    def __init__(self, mesh: DeviceMesh, *tensors: Tensor) -> None:
        self.group, n, r = mesh.get_group(), mesh.size(), mesh.get_local_rank()
        self.after, self.before = (dist.get_global_rank(self.group, (r + step) % n) for step in (1, -1))
        self.here = tuple(t.contiguous() for t in tensors)
        self.work: list[Any] = []

    def send(self) -> None:
        """Begin to pass on what is here."""
        self.coming = tuple(torch.empty_like(t) for t in self.here)
        sends = [dist.P2POp(dist.isend, t, self.after, self.group) for t in self.here]
        receives = [dist.P2POp(dist.irecv, t, self.before, self.group) for t in self.coming]
        self.work = dist.batch_isend_irecv([*sends, *receives])

    def wait(self) -> tuple[Tensor, ...]:
        """What the process before had."""
        for work in self.work:
            work.wait()
        self.here = self.coming
        return self.here


def _seen(step: int, r: int, half: int) -> tuple[slice, slice]:
    """Which queries of process r see which keys of process r - step: all pairs between these, none else.

    Of an earlier process the first piece is seen by all, the second by none; of a later one both by the
    second alone.  At step 0 they are a process's own, and the mask is causal.
    """
    whole = slice(None)
    if step == 0:
        return whole, whole
    return (whole, slice(half)) if step <= r else (slice(half, None), whole)


class RingAttention(torch.autograd.Function):
    """Causal attention of this process's queries over the keys of all.

    q, (B, H, T / n, D), k and v, (B, H_kv, T / n, D); returns (B, H, T / n, D).
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mesh: DeviceMesh, dropout_p: float) -> Tensor:
        op, n, r, half = OPS["attention"], mesh.size(), mesh.get_local_rank(), q.shape[2] // 2
        ring, seeds = Ring(mesh, k, v), [new_seed(q) if dropout_p else None for _ in range(n)]
        out = q.new_zeros(*q.shape[:3], v.shape[3], dtype=torch.float32)
        lse = q.new_full(q.shape[:3], -math.inf, dtype=torch.float32)
        for step in range(n):
            k_now, v_now = ring.here if step == 0 else ring.wait()
            if step < n - 1:
                ring.send()
            mine, theirs = _seen(step, r, half)
            rules = _rules(step, q, seeds[step], dropout_p)
            got = op.fwd(q[:, :, mine], k_now[:, :, theirs], v_now[:, :, theirs], *rules)
            _merge(out[:, :, mine], lse[:, :, mine], *got)
        ctx.save_for_backward(q, k, v, out := out.to(q.dtype), lse)
        ctx.mesh, ctx.seeds, ctx.dropout_p = mesh, seeds, dropout_p
        return out

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        op, mesh, (q, k, v, out, lse) = OPS["attention"], ctx.mesh, ctx.saved_tensors
        n, r, half, dout = mesh.size(), mesh.get_local_rank(), q.shape[2] // 2, op.prepare_grad(dout)
        dq, dk, dv = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (q, k, v))
        keys, grads = Ring(mesh, k, v), Ring(mesh, torch.zeros_like(dk), torch.zeros_like(dv))
        for step in range(n):
            k_now, v_now = keys.here if step == 0 else keys.wait()
            if step < n - 1:
                keys.send()
            mine, theirs = _seen(step, r, half)
            q_part, out_part, dout_part = (t[:, :, mine] for t in (q, out, dout))
            lse_part = lse[:, :, mine].contiguous()
            d = op.bwd(
                dout_part, None, q_part, k_now[:, :, theirs], v_now[:, :, theirs],
                *_rules(step, q, ctx.seeds[step], ctx.dropout_p), out_part, lse_part, NEEDS,
            )  # fmt: skip
            dq[:, :, mine] += d[0]
            into = (dk, dv) if step == 0 else grads.here if step == 1 else grads.wait()
            for total, more in zip(into, d[1:3]):
                total[:, :, theirs] += more
            if step:
                grads.send()  # on with their keys; from the last step home
        if n > 1:
            for total, more in zip((dk, dv), grads.wait()):
                total += more
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _rules(step: int, q: Tensor, seed: Tensor | None, dropout_p: float) -> tuple:
    """The arguments of the op behind q, k and v (`llmkern.ops.attention_rules.Rules`)."""
    right = 0 if step == 0 else None
    return None, None, None, None, seed, 0, None, right, 1 / math.sqrt(q.shape[-1]), 0.0, dropout_p


def _merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Add the attention over more keys to that so far, in place."""
    both = torch.logaddexp(lse, more_lse)
    out.mul_((lse - both).exp()[..., None]).add_(more * (more_lse - both).exp()[..., None])
    lse.copy_(both)
