"""DTensor on two processes: what an op gives, and its gradients, are those of one process."""

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp

from llmkern import ops


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def integers(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(0))


# name -> (function, tensors, the dimension in which each is split, or None)
CASES = {
    "linear, rows": (ops.linear, (randn(8, 6), randn(10, 6), randn(10)), (0, None, None)),
    "linear, columns": (ops.linear, (randn(8, 6), randn(10, 6), randn(10)), (None, 0, 0)),
    "linear, inner": (ops.linear, (randn(8, 6), randn(10, 6)), (1, 1)),
    "layer_norm, rows": (
        lambda x, w, b: ops.layer_norm(x, (6,), w, b), (randn(8, 6), randn(6), randn(6)), (0, None, None),
    ),
    "rms_norm, rows": (lambda x, w: ops.rms_norm(x, (6,), w), (randn(8, 6), randn(6)), (0, None)),
    "ffn, rows": (
        lambda x, a, b, c, d: ops.ffn(x, a, b, c, d, "gelu"),
        (randn(8, 6), randn(12, 6), randn(12), randn(6, 12), randn(6)), (0, None, None, None, None),
    ),
    "ffn, hidden": (
        lambda x, a, b, c: ops.ffn(x, a, b, c, None, "gelu"),
        (randn(8, 6), randn(12, 6), randn(12), randn(6, 12)), (None, 0, 0, 1),
    ),
    "attention, batch": (
        lambda q, k, v: ops.attention(q, k, v, is_causal=True),
        (randn(2, 4, 9, 8), randn(2, 2, 9, 8), randn(2, 2, 9, 8)), (0, 0, 0),
    ),
    "attention, heads": (
        lambda q, k, v, s: ops.attention(q, k, v, is_causal=True, sinks=s),
        (randn(2, 4, 9, 8), randn(2, 2, 9, 8), randn(2, 2, 9, 8), randn(4)), (1, 1, 1, 0),
    ),
    "softmax, rows": (ops.softmax, (randn(8, 6),), (0,)),
    "cross_entropy, rows": (
        lambda x, t: ops.cross_entropy(x, t, reduction="none"), (randn(8, 6), integers(6, 8)), (0, 0),
    ),
    "linear_cross_entropy, rows": (
        lambda x, w, b, t: ops.linear_cross_entropy(x, w, t, linear_bias=b, reduction="none"),
        (randn(8, 6), randn(10, 6), randn(10), integers(10, 8)), (0, None, None, 0),
    ),
    "linear_cross_entropy, rows, gradients from forward": (
        lambda x, w, b, t: ops.linear_cross_entropy(x, w, t, linear_bias=b, ignore_index=3),
        (randn(8, 6), randn(10, 6), randn(10), integers(10, 8)), (0, None, None, 0),
    ),
}  # fmt: skip


def run(function, tensors) -> list[torch.Tensor]:
    """The output and the gradients of all tensors that can have one."""
    leaves = [t.requires_grad_() for t in tensors if t.is_floating_point()]
    out = function(*tensors)
    return [out, *torch.autograd.grad((out * out.sin()).sum(), leaves)]


def worker(rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2,))
    for name, (function, tensors, dims) in CASES.items():
        whole = run(function, [t.clone() for t in tensors])
        placements = [[Replicate() if d is None else Shard(d)] for d in dims]
        split = [distribute_tensor(t.clone(), mesh, p) for t, p in zip(tensors, placements)]
        results = run(function, split)
        assert results[0].placements != (Replicate(),), f"{name} gathers its input"
        for got, expected in zip(results, whole):
            torch.testing.assert_close(got.full_tensor(), expected, rtol=1e-4, atol=1e-5, msg=name)
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_give_what_one_gives():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port,), nprocs=2)
