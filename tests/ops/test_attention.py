"""Attention: what the op table cannot say."""

import pytest
import torch
import torch.nn.functional as F
from error_rule import run, violations
from torch.utils._python_dispatch import TorchDispatchMode

from llmkern import ops
from llmkern.ops import OPS
from llmkern.ops.op import Sample

pytestmark = pytest.mark.usefixtures("strict")


def randn(*shape: int, **kwargs) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(**kwargs)


ONE_OPTION = {
    "negative scale": {"scale": -0.7},
    "softcap": {"softcap": 1.5},
    "window": {"window": (7, 3)},
    "causal window": {"is_causal": True, "window": (9, 0)},
    "causal": {"is_causal": True},
    "dropout": {"dropout_p": 0.4, "dropout_seed": torch.tensor(2**40 + 3)},
    "sinks": {"sinks": randn(1)},
    "slopes": {"alibi_slopes": randn(1).abs()},
}


@pytest.mark.parametrize("option", ONE_OPTION)
def test_one_option(backend: str, device: str, option: str):
    """The error rule on several tiles of queries and keys, with one option at a time."""
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in ONE_OPTION[option].items()}
    q, k, v = (randn(1, 1, 100, 16, device=device) for _ in range(3))
    sample = Sample(option, (2 * q, k.flip(2), v), options)
    op = OPS["attention"]
    bad = violations(op, sample, torch.float32, run(op, sample, backend=backend))
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_are_attention_of_each(backend: str, device: str, causal: bool, align: str):
    lengths_q, lengths_k = (0, 7, 1, 40, 0, 12), (3, 9, 0, 25, 0, 12)
    cu_q, cu_k = (F.pad(torch.tensor(n).cumsum(0), (1, 0)) for n in (lengths_q, lengths_k))
    q, k, v = randn(60, 4, 16, device=device), randn(49, 2, 16, device=device), randn(49, 2, 8, device=device)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    options = {"is_causal": causal, "causal_align": align, "window": (9, -1)}
    with ops.use(backend):
        out, lse = ops.attention_varlen(
            q, k, v, cu_q.to(device, torch.int32), cu_k.to(device), return_lse=True, **options
        )
        grads = torch.autograd.grad(out.square().sum() + lse.exp().sum(), leaves)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    parts = zip(*(t.split(n) for t, n in zip(exact, (lengths_q, lengths_k, lengths_k))))
    with ops.use("reference"):
        loss = 0.0
        for n, part in enumerate(parts):
            one, one_lse = ops.attention(*(t.transpose(0, 1)[None] for t in part), return_lse=True, **options)
            rows = slice(int(cu_q[n]), int(cu_q[n + 1]))
            torch.testing.assert_close(out[rows].double(), one[0].transpose(0, 1), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(lse[:, rows].double(), one_lse[0], rtol=1e-4, atol=1e-5)
            loss = loss + one.square().sum() + one_lse.exp().sum()
        expected = torch.autograd.grad(loss, exact)
    for got, want in zip(grads, expected):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_queries_behind_the_last_sequence_see_nothing(backend: str, device: str):
    q = randn(10, 1, 8, device=device)
    with ops.use(backend):
        out, lse = ops.attention_varlen(q, q, q, torch.tensor([0, 4, 7], device=device), return_lse=True)
    assert out[:7].all() and not out[7:].any() and (lse[:, 7:] == -torch.inf).all()


class Copies(TorchDispatchMode):
    """Names of the operators that copy a tensor."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_packed_projection_is_not_copied():
    q, k, v = randn(2, 10, 3, 4, 16).permute(2, 0, 3, 1, 4)  # from (B, S, 3, H, D)
    with Copies() as copies:
        ops.attention(q, k, v, is_causal=True)
        ops.attention_varlen(*randn(20, 3, 4, 16).unbind(1), torch.tensor([0, 8, 20]))
        assert not copies.seen
        ops.attention(*(t.transpose(2, 3) for t in (q, k, v)))  # its last stride is not 1
        assert len(copies.seen) == 3


class TestDropout:
    def test_every_probability_is_dropped_or_scaled(self, backend: str, device: str):
        """Values that are the unit vectors show the probabilities."""
        q = randn(2, 3, 64, 64, device=device)
        eye = torch.eye(64, device=device).expand(2, 3, 64, 64)
        seed = torch.tensor(11, device=device)
        with ops.use(backend):
            whole = ops.attention(q, q, eye)
            dropped = ops.attention(q, q, eye, dropout_p=0.25, dropout_seed=seed)
        kept = dropped != 0
        torch.testing.assert_close(dropped, torch.where(kept, whole / 0.75, 0.0), rtol=1e-5, atol=1e-7)
        assert abs(kept.float().mean().item() - 0.75) < 0.01  # 24576 draws: 3.6 standard deviations
        assert not torch.equal(kept[0, 0], kept[0, 1]) and not torch.equal(kept[0], kept[1])

    def test_reproducible(self):
        q = randn(1, 2, 40, 16)

        def run():
            return ops.attention(q, q, q, dropout_p=0.5)

        torch.manual_seed(3)
        first, second = run(), run()
        torch.manual_seed(3)
        assert torch.equal(first, run()) and not torch.equal(first, second)

    def test_the_same_numbers_on_every_backend(self, backend: str, device: str):
        q, seed = randn(1, 2, 70, 16, device=device), torch.tensor(5, device=device)
        with ops.use(backend):
            ours = ops.attention(q, q, q, dropout_p=0.5, dropout_seed=seed)
        with ops.use("reference"):
            torch.testing.assert_close(ours, ops.attention(q, q, q, dropout_p=0.5, dropout_seed=seed))


def test_a_million_tokens():
    """Far more than a score matrix could hold; a window of 64 sees what it would see alone."""
    length, left = 2**20, 64
    q, k, v = (randn(1, 1, length, 8) for _ in range(3))
    out = ops.attention(q, k, v, is_causal=True, window=(left, -1))
    for start in (0, 12345, length - 100):
        rows, before = slice(start, start + 100), max(0, start - left)
        keys = slice(before, start + 100)
        alone = ops.attention(
            q[:, :, rows], k[:, :, keys], v[:, :, keys],
            is_causal=True, window=(left, -1), causal_align="bottom_right",
        )  # fmt: skip
        torch.testing.assert_close(out[:, :, rows], alone)


def test_a_document_is_as_if_it_were_alone():
    """Not a bit of another document comes in, whatever it holds."""
    q = randn(1, 2, 90, 16)
    ids = torch.tensor([[0] * 40 + [1] * 50])
    out = ops.attention(q, q, q, is_causal=True, document_ids=ids)
    other = q.clone()
    other[:, :, :40] = 1e6
    assert torch.equal(
        out[:, :, 40:], ops.attention(other, other, other, is_causal=True, document_ids=ids)[:, :, 40:]
    )


def test_sink_gradient_alone():
    """With nothing else to differentiate."""
    q, sinks = randn(2, 4, 30, 8), randn(4).requires_grad_()
    (grad,) = torch.autograd.grad(ops.attention(q, q, q, sinks=sinks).sum(), sinks)
    exact = sinks.detach().double().requires_grad_()
    with ops.use("reference"):
        (want,) = torch.autograd.grad(ops.attention(*(q.double(),) * 3, sinks=exact).sum(), exact)
    torch.testing.assert_close(grad.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_exponentials_are_not_rounded(backend: str, device: str, dtype: torch.dtype):
    """lse is float32 whatever the dtype: no coarser than the exponentials, 3e-6, and the sums of scores."""
    q, k = (randn(1, 2, n, 64, device=device, dtype=dtype) for n in (40, 300))
    with ops.use(backend):
        _, lse = ops.attention(q, k, k, return_lse=True)
    expected = (q.double() @ k.double().mT / 8).logsumexp(-1)
    torch.testing.assert_close(lse.double(), expected, rtol=0, atol=1e-5)
