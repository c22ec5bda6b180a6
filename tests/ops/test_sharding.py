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


TABLES = ops.rope_table(9, 8)
INT4 = ops.quantize(randn(10, 64), 4, 32, False)
CACHE = (
    randn(2, 4, 1, 8), randn(2, 2, 6, 8), randn(2, 2, 6, 8), torch.tensor([3, 5]),
    randn(2, 2, 1, 8), randn(2, 2, 1, 8),
)  # fmt: skip


def rotated(q, k):
    return torch.cat(ops.rope(q, k, *TABLES), 3)


def rotated_in_place(q, k):
    return ops.rope_(q, k, *TABLES)[0]


def decode(*args):
    return ops.decode_attention(*args, cos=TABLES[0], sin=TABLES[1])


def step(p, g, m, v):
    ops.adamw([p], [g], [m], [v], step=3)
    return p


def norm(*grads):
    return ops.grad_norm(list(grads))


IN_PLACE = {rotated_in_place, decode, step, norm}

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
    "linear_cross_entropy, classes": (
        lambda x, w, b, t: ops.linear_cross_entropy(x, w, t, linear_bias=b),
        (randn(8, 6), randn(11, 6), randn(11), integers(11, 8)), (None, 0, 0, None),
    ),
    "linear_cross_entropy, classes, all options": (
        lambda x, w, b, t: ops.linear_cross_entropy(
            x, w, t, linear_bias=b, weight=torch.arange(1.0, 12), reduction="none", ignore_index=4,
            label_smoothing=0.2, z_loss=1e-2, softcap=3.0,
        ),
        (randn(2, 4, 6), randn(11, 6), randn(11), integers(11, 2, 4)), (1, 0, 0, None),
    ),
    "embedding, tokens": (
        lambda i, w, p: ops.embedding(i, w, p, padding_idx=2),
        (integers(9, 4, 5), randn(9, 6), randn(7, 6)), (0, None, None),
    ),
    "embedding, columns": (ops.embedding, (integers(9, 4, 5), randn(9, 6), randn(7, 6)), (None, 1, 1)),
    "rope, sequences": (rotated, (randn(2, 4, 9, 8), randn(2, 4, 9, 8)), (0, 0)),
    "rope, heads": (rotated, (randn(2, 4, 9, 8), randn(2, 4, 9, 8)), (1, 1)),
    "rope, tokens": (
        lambda q, ids: ops.rope(q, None, *TABLES, position_ids=ids),
        (randn(1, 2, 8, 8), integers(9, 8)), (2, 0),
    ),
    "rope_, heads": (rotated_in_place, (randn(2, 4, 9, 8), randn(2, 2, 9, 8)), (1, 1)),
    "dropout, rows": (lambda x: ops.dropout(x, 0.4, seed=torch.tensor(3)), (randn(8, 70),), (0,)),
    "dropout, sequences": (
        lambda x, r: ops.dropout(x, 0.4, seed=torch.tensor(3), residual=r),
        (randn(4, 3, 6), randn(4, 3, 6)), (0, 0),
    ),
    "quant_linear, rows": (ops.quant_linear, (randn(8, 64), *INT4, randn(10)), (0, *[None] * 4)),
    "quant_linear, outputs": (ops.quant_linear, (randn(8, 64), *INT4, randn(10)), (None, 0, 0, 0, 0)),
    "quant_linear, inputs": (ops.quant_linear, (randn(8, 64), *INT4), (1, 1, 1, 1)),
    "decode_attention, heads": (decode, CACHE, (1, 1, 1, None, 1, 1)),
    "decode_attention, sequences": (decode, CACHE, (0,) * 6),
    "adamw": (step, (randn(9, 4), randn(9, 4), randn(9, 4), randn(9, 4).square()), (0, 0, 0, 0)),
    "grad_norm": (norm, (randn(9, 4), randn(5), randn(3)), (0, None, 0)),
}  # fmt: skip


GATHER = {"linear_cross_entropy, classes, all options"}  # of hidden states, never of logits


def run(function, tensors) -> list[torch.Tensor | None]:
    """The output and the gradients of all tensors; without gradients, the tensors: it may write to them."""
    if function in IN_PLACE:
        return [function(*tensors), *tensors]
    leaves = [t.requires_grad_() for t in tensors if t.is_floating_point()]
    out = function(*tensors)
    return [out, *torch.autograd.grad((out * out.sin()).sum(), leaves, allow_unused=True)]


def worker(rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.debug import CommDebugMode

    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2,))
    for name, (function, tensors, dims) in CASES.items():
        whole = run(function, [t.clone() for t in tensors])
        placements = [[Replicate() if d is None else Shard(d)] for d in dims]
        split = [distribute_tensor(t.clone(), mesh, p) for t, p in zip(tensors, placements)]
        with CommDebugMode() as seen:
            results = run(function, split)
        assert not any("gather" in str(op) for op in seen.get_comm_counts()) or name in GATHER, name
        for got, expected in zip(results, whole):
            if expected is not None:
                got = got.full_tensor() if isinstance(got, DTensor) else got
                atol = 1e-5 * max(1.0, expected.abs().max().item())
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=atol, msg=name)
    torch.manual_seed(rank)
    drawn = ops.dropout(distribute_tensor(torch.ones(64), mesh, [Replicate()])).to_local()
    other = [torch.empty_like(drawn) for _ in range(2)]
    torch.distributed.all_gather(other, drawn)
    assert torch.equal(*other), "processes with generators of their own drop the same"
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_give_what_one_gives():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port,), nprocs=2)
