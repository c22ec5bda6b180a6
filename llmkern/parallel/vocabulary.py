"""Embedding and loss over a vocabulary that is divided: each process has rows of the matrix; logits stay.

Source: Shoeybi et al. 2019, Megatron-LM, arXiv:1909.08053, section 3.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import ops
from ..ops.op import autocast
from .exchange import total

IGNORED = -100  # a target that does not count


def rows_of(size: int, mesh: DeviceMesh) -> range:
    """The tokens whose rows this process has, as `Shard(0)` divides them."""
    each = -(-size // mesh.size())
    return range(size)[mesh.get_local_rank() * each :][:each]


def embed(idx: Tensor, weight: Tensor, rows: range) -> Tensor:
    """This process's term of the embeddings of (B, T) ids: (B, T, C), 0 where another has the row."""
    mine = (idx >= rows.start) & (idx < rows.stop)
    return F.embedding((idx - rows.start).where(mine, 0), weight).masked_fill(~mine[..., None], 0)


def loss(hidden: Tensor, weight: Tensor, targets: Tensor, rows: range, mesh: DeviceMesh) -> Tensor:
    """The sum of the cross-entropies of all targets that count, on all processes.

        loss = log Σ_r exp(lse_r) - z[t]

    Each process's lse_r comes from its own rows, tile by tile; two numbers a token are exchanged.

    Args:
        hidden: (B, T, C), the same on all.
        weight: (V_r, C), this process's rows of the head.
        targets: (B, T).
        rows: those.
    """
    kept = targets != IGNORED
    mine = kept & (targets >= rows.start) & (targets < rows.stop)
    local = (targets - rows.start).where(mine, 0)
    x, row = (t.float() for t in autocast(hidden, F.embedding(local, weight)))
    chosen = (x * row).sum(-1)  # z[local], (B, T)
    lse = ops.linear_cross_entropy(hidden, weight, local, reduction="none").float() + chosen
    top = lse.detach().clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, mesh.get_group())
    sums, hit = total(torch.stack(((lse - top).exp(), chosen.where(mine, 0))), mesh)
    return (top + sums.log() - hit).where(kept, 0).sum()
