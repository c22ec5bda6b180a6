"""What the table cannot say of linear_cross_entropy: many tiles, little memory, odd logits and targets."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from guard_pages import guarded
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from llmkern import ops
from llmkern.ops import OPS, linear_cross_entropy

pytestmark = pytest.mark.usefixtures("strict")


def randn(*shape, device="cpu", scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(device) * scale


def integers(high: int, n: int, device="cpu"):
    return torch.randint(high, (n,), generator=torch.Generator().manual_seed(0)).to(device)


@pytest.fixture
def small_tiles(monkeypatch):
    """Triton's parts of vocabulary and batch are so large that no small input has two."""
    config = pytest.importorskip("llmkern.kernels.config")
    for name, size in {"PART": 32, "ROWS": 16, "COLS": 32}.items():
        monkeypatch.setattr(config, f"LINEAR_LOSS_{name}", size)
    tiles = pytest.importorskip("llmkern.kernels.tiles")
    small = {k: tiles.Tile(16, 16, 16, 1, 1) for k in tiles.TABLE if k[0] == "gemm"}
    monkeypatch.setattr(tiles, "TABLE", {**tiles.TABLE, **small})


def gradients(x: Tensor, head: Tensor, target: Tensor, backend: str, **kwargs) -> list[Tensor]:
    leaves = [
        t.detach().requires_grad_() for t in (x, head, kwargs.pop("linear_bias", None)) if t is not None
    ]
    bias = {"linear_bias": leaves[2]} if len(leaves) > 2 else {}
    with ops.use(backend):
        loss = linear_cross_entropy(leaves[0], leaves[1], target, **bias, **kwargs)
        return [loss.detach(), *torch.autograd.grad(loss, leaves, torch.ones_like(loss))]


def close_to_float64(
    backend: str, device: str, n: int, classes: int, dim: int, reduction: str = "none"
) -> None:
    x, head, bias = randn(n, dim), randn(classes, dim), randn(classes)
    target = integers(classes, n).where(torch.arange(n) % 5 > 0, -100)
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 8.0, "reduction": reduction}
    got = gradients(
        *(t.to(device) for t in (x, head, target)), backend, linear_bias=bias.to(device), **options
    )
    exact = gradients(x.double(), head.double(), target, "reference", linear_bias=bias.double(), **options)
    for a, b in zip(got, exact):
        torch.testing.assert_close(a.double().cpu(), b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


def test_many_tiles(backend: str, device: str, small_tiles):
    if backend == "triton":
        close_to_float64(backend, device, 35, 77, 20)
    else:
        close_to_float64(backend, device, 2700, 2100, 20)  # 2160 rows that count
        close_to_float64(backend, device, 700, 2100, 20, "sum")  # gradients from forward, two chunks of rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_from_forward(dtype: torch.dtype):
    """They are those of backward: scaled by what came, made anew if that is no multiple of them."""
    op = OPS["linear_cross_entropy"]
    x, head, target = randn(600, 24).to(dtype), randn(1100, 24).to(dtype), integers(1100, 600)
    plain = (x, head, None, target, None), (-100, 0.0, 0.0, 0.0, 0, 1100)
    factor = torch.tensor(0.25)
    early = op.fwd(*plain[0], factor, *plain[1], [True, True, False])
    late = op.fwd(*plain[0], None, *plain[1], [False] * 3)
    for a, b in zip(early[:3], late[:3]):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for dloss in (torch.full((600,), 0.5), torch.linspace(0, 1, 600)):
        got, expected = (
            op.bwd(dloss, *plain[0], *outs[1:3], known, *outs[3:], *plain[1], [True, True, False])
            for outs, known in ((early, factor), (late, None))
        )
        for a, b in zip(got[:2], expected[:2]):
            rtol = 1e-5 if dtype == torch.float32 else 2**-7
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.abs().max().item())


def test_when_forward_makes_gradients():
    """With a sum or mean, and a gradient wanted; not in float16, whose gradients a GradScaler has to lift."""

    def backward_flops(dtype=torch.float32, reduction="mean", backend="cpp") -> int:
        x, head = randn(6, 4).to(dtype).requires_grad_(), randn(9, 4).to(dtype).requires_grad_()
        with ops.use(backend):
            loss = linear_cross_entropy(x, head, integers(9, 6), reduction=reduction).sum()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        return counter.get_total_flops()

    assert backward_flops() == backward_flops(torch.bfloat16, "sum") == 0
    late = 3 * 2 * 6 * 9 * 4
    assert backward_flops(torch.float16) == backward_flops(reduction="none") == late
    assert backward_flops(backend="reference") == late


def test_same_bits_for_any_thread_count_over_many_tiles():
    x, head, target = randn(2100, 8), randn(2100, 8), integers(2100, 2100)
    threads = torch.get_num_threads()
    runs = []
    for n in (1, 2, 4):
        torch.set_num_threads(n)
        runs.append(gradients(x, head, target, "cpp"))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other))


@pytest.mark.parametrize("wanted", ["input", "linear_weight"])
def test_sums_are_float32(backend: str, device: str, wanted: str, small_tiles):
    """A bfloat16 gradient is rounded once, not once for every tile that adds to it."""
    long = 16 * 16 if backend == "triton" else 16 * 2048
    n, classes = (8, long) if wanted == "input" else (long, 8)
    x, head = (randn(size, 32, device=device).abs().bfloat16() for size in (n, classes))
    head[3] = 0  # nothing cancels in dx = Σ p w - w[3]
    target = torch.full((n,), 3, device=device)
    got = gradients(x, head, target, backend, reduction="sum")
    exact = gradients(x.double(), head.double(), target, "reference", reduction="sum")
    got, exact = (g[1] if wanted == "input" else g[2][3] for g in (got, exact))

    def error(rounded: Tensor) -> Tensor:
        return ((rounded - exact) / exact).square().mean().sqrt()

    assert error(got) < 1.2 * error(exact.bfloat16())


@pytest.mark.parametrize("classes", [1, 17, 33, 70])
def test_padded_classes_do_not_count(backend: str, device: str, classes: int):
    """Logits far below 0: a padded column's 0 would be the maximum."""
    x, head, target = (
        randn(5, 8, device=device),
        randn(classes, 8, device=device),
        integers(classes, 5, device),
    )
    bias = torch.full((classes,), -1000.0, device=device)
    got = gradients(x, head, target, backend, linear_bias=bias)
    exact = gradients(x, head, target, backend)
    for a, b in zip(got, exact):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_banned_classes(backend: str, device: str):
    x, head, target = randn(5, 8, device=device), randn(33, 8, device=device), integers(20, 5, device)
    bias = torch.zeros(33, device=device)
    bias[20:] = -math.inf
    got = gradients(x, head, target, backend, linear_bias=bias)
    exact = F.cross_entropy(F.linear(x, head[:20]), target)
    torch.testing.assert_close(got[0], exact)
    assert all(t.isfinite().all() for t in got) and (got[2][20:] == 0).all()


def test_nan_stays_in_its_row(backend: str, device: str):
    x, head, target = randn(6, 8, device=device), randn(33, 8, device=device), integers(33, 6, device)
    x[2, 7] = math.nan
    losses, dx, *_ = gradients(x, head, target, backend, reduction="none")
    assert losses.isnan().tolist() == [i == 2 for i in range(6)]
    assert dx[2].isnan().all() and not dx[[0, 1, 3, 4, 5]].isnan().any()


def test_all_targets_ignored(backend: str, device: str):
    x, head = randn(3, 8, device=device), randn(5, 8, device=device)
    target = torch.full((3,), 7, device=device)
    loss, *grads = gradients(
        x, head, target, backend, ignore_index=7, reduction="sum", linear_bias=torch.zeros(5, device=device)
    )
    assert loss == 0 and all((g == 0).all() for g in grads) and len(grads) == 3
    with ops.use(backend):
        assert linear_cross_entropy(x, head, target, ignore_index=7).isnan()  # 0/0, as torch


@pytest.mark.parametrize("implementation", ["reference", "cpp"])
@pytest.mark.parametrize("target", [4, -1, 2**40])
def test_target_out_of_range(implementation: str, target: int):
    match = rf"linear_cross_entropy: target {target} is out of range, expected 0 to 3"
    with ops.use(implementation), pytest.raises(IndexError, match=match):
        linear_cross_entropy(torch.zeros(3, 2), torch.zeros(4, 2), torch.tensor([0, target, -100]))


def test_target_out_of_range_is_nan_on_a_gpu(device: str = "cuda" if torch.cuda.is_available() else "cpu"):
    pytest.importorskip("triton")
    x, head = randn(3, 8, device=device), randn(33, 8, device=device)
    target = torch.tensor([0, 40, -100], device=device)  # 40 is a padded column of the tile
    losses, dx, *_ = gradients(x, head, target, "triton", reduction="none")
    assert losses.isnan().tolist() == [False, True, False]
    assert dx[1].isnan().all() and dx[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["start", "end"])
def test_no_read_or_write_outside(backend: str, device: str, dtype: torch.dtype, side: str):
    if device != "cpu":
        pytest.skip("guard pages are memory of the CPU")
    for n, d, c in ((5, 7, 19), (9, 33, 65)):
        x, head, bias, weight = (guarded(randn(*s).to(dtype), side) for s in ((n, d), (c, d), (c,), (c,)))
        target = guarded(integers(c, n), side)
        gradients(x, head, target, backend, linear_bias=bias, weight=weight.abs(), label_smoothing=0.1)


MEMORY = """
import torch
from benchmarks.measure import resident_rise
from llmkern.ops import OPS
from llmkern.ops.op import Make
make, op = Make(torch.float32), OPS["linear_cross_entropy"]
def rise(function, n, c):
    x, head, target = make(n, 32).requires_grad_(), make(c, 32).requires_grad_(), make.integers(c, n)
    return resident_rise(lambda: function(x, head, target).backward())
for function in (op.public, op.eager):
    rise(function, 4, 5)
    print(rise(function, 2048, 8192))
"""


def test_memory():
    """Loss and gradients, scratch included, in at most 1/8 of what the logits make torch take."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("resident memory is read from /proc")
    root = Path(__file__).parent.parent.parent
    result = subprocess.run([sys.executable, "-c", MEMORY], cwd=root, check=True, capture_output=True)
    ours, eager = map(int, result.stdout.split())
    assert eager > 2 * 4 * 2048 * 8192  # logits and their gradient
    assert ours < eager / 8, f"{ours / 2**20:.0f} MiB against {eager / 2**20:.0f} MiB"


def r(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


T = torch.tensor([0, 1])
BAD = {
    "reduction is 'avg'": lambda: linear_cross_entropy(r(2, 4), r(3, 4), T, reduction="avg"),
    "label_smoothing is 2.0": lambda: linear_cross_entropy(r(2, 4), r(3, 4), T, label_smoothing=2.0),
    "z_loss is -1.0": lambda: linear_cross_entropy(r(2, 4), r(3, 4), T, z_loss=-1.0),
    "softcap is 0.0": lambda: linear_cross_entropy(r(2, 4), r(3, 4), T, softcap=0.0),
    "input is torch.int64": lambda: linear_cross_entropy(r(2, 4, dtype=torch.int64), r(3, 4), T),
    "linear_weight has shape (4, 3)": lambda: linear_cross_entropy(r(2, 4), r(4, 3), T),
    "at least one class": lambda: linear_cross_entropy(r(2, 4), r(0, 4), T),
    "linear_weight is torch.float16": lambda: linear_cross_entropy(r(2, 4), r(3, 4, dtype=torch.float16), T),
    "linear_weight is on meta": lambda: linear_cross_entropy(r(2, 4), r(3, 4, device="meta"), T),
    "target is torch.float32": lambda: linear_cross_entropy(r(2, 4), r(3, 4), r(2)),
    "target has shape (2,), expected (3,)": lambda: linear_cross_entropy(r(3, 4), r(3, 4), T),
    "linear_bias has shape (2,)": lambda: linear_cross_entropy(r(2, 4), r(3, 4), T, linear_bias=r(2)),
    "weight has shape (4,)": lambda: linear_cross_entropy(r(2, 4), r(3, 4), T, weight=r(4)),
    "weight is torch.float16": lambda: linear_cross_entropy(
        r(2, 4), r(3, 4), T, weight=r(3, dtype=torch.float16)
    ),
}


@pytest.mark.parametrize("words", BAD)
def test_one_sentence(words: str):
    with pytest.raises(ValueError) as caught:
        BAD[words]()
    message = str(caught.value)
    assert words in message and message.startswith("linear_cross_entropy: ")
    assert "\n" not in message and len(message) < 200
