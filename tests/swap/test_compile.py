"""torch.compile(backend="llmkern"): the same numbers forward and backward, by the ops that belong there."""

import math
from importlib import metadata

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmkern
from llmkern.ops import dispatch
from llmkern.report import NoEffectWarning

D = 16


@pytest.fixture(autouse=True)
def fresh(strict):
    torch.manual_seed(0)
    torch._dynamo.reset()
    llmkern.backend.reset()


def check(function, *args: Tensor, ops: str = "", then: str = "eager", training: bool = True) -> None:
    """Compiled and eager agree, and these ops ran, forward and backward."""
    leaves = [a for a in args if a.requires_grad]
    if isinstance(function, nn.Module):
        leaves += list(function.parameters())
    expected = function(*args)
    grads = torch.autograd.grad(expected.square().sum(), leaves, allow_unused=True)
    compiled = torch.compile(function, backend="llmkern_test", options={"then": then})
    with dispatch.record() as ran:
        out = compiled(*args)
        again = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again, grads, rtol=1e-4, atol=1e-5)
    assert {half for half, _ in ran} == {f"{op}_{half}" for op in ops.split() for half in ("fwd", "bwd")}
    assert all(backend == "cpp" for _, backend in ran)


if "llmkern_test" not in torch._dynamo.list_backends():
    torch._dynamo.register_backend(compiler_fn=llmkern.backend, name="llmkern_test")


def heads(*shape: int) -> list[Tensor]:
    return [torch.randn(2, 4, 5, 8, requires_grad=True) for _ in range(3)]


CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
ADDED = torch.zeros(5, 5).masked_fill(CAUSAL, -1e4)


def plain(q, k, v):
    return F.softmax(q @ k.transpose(-2, -1) / math.sqrt(8), dim=-1) @ v


def unscaled(q, k, v):
    return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(2, 3)), -1), v)


def nanogpt(q, k, v):
    bias = torch.tril(torch.ones(5, 5)).view(1, 1, 5, 5)
    att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    att = att.masked_fill(bias[:, :, :5, :5] == 0, float("-inf"))
    return F.dropout(F.softmax(att, dim=-1), 0.1, False) @ v


def hidden(q, k, v):
    return (q @ k.transpose(-2, -1)).masked_fill(CAUSAL, -torch.inf).softmax(-1) @ v


def added(q, k, v):
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.5 + ADDED
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


def permuted(q, k, v):
    return torch.matmul((q @ k.permute(0, 1, 3, 2)).softmax(dim=-1), v)


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("function", [plain, unscaled, nanogpt, hidden, added, permuted, sdpa])
def test_attention(function):
    check(function, *heads(), ops="attention")


def test_a_causal_mask_made_of_constants_is_seen(monkeypatch):
    """Then the kernel skips what is hidden, and no mask is read."""
    seen = []
    function = llmkern.ops.attention
    monkeypatch.setattr(llmkern.ops, "attention", lambda *a: seen.append(a[3:6]) or function(*a))
    torch.compile(nanogpt, backend="llmkern_test")(*heads())
    assert seen == [(None, 0.0, True)]


def two_uses(q, k, v):
    weights = F.softmax(q @ k.transpose(-2, -1), dim=-1)
    return weights @ v + weights.sum()


def other_axis(q, k, v):
    return F.softmax(q @ k.transpose(-2, -1), dim=-2) @ v


def masked_by_little(q, k, v):
    return F.softmax((q @ k.transpose(-2, -1)).masked_fill(CAUSAL, -2.0), dim=-1) @ v


def learned_bias(q, k, v):
    return F.softmax(q @ k.transpose(-2, -1) + q[..., :5] * 2, dim=-1) @ v


@pytest.mark.parametrize("function", [two_uses, other_axis, masked_by_little, learned_bias])
def test_what_looks_like_attention_only(function):
    with pytest.warns(NoEffectWarning):
        check(function, *heads())


class FFN(nn.Module):
    def __init__(self, act=F.gelu, gated: bool = False, drop: float = 0.0) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, 24), nn.Linear(24, D)
        self.c = nn.Linear(D, 24) if gated else None
        self.act, self.drop = act, drop

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.a(x)) * self.c(x) if self.c is not None else self.act(self.a(x))
        return F.dropout(self.b(F.dropout(h, self.drop, self.training)), self.drop, self.training)


@pytest.mark.parametrize("act", [F.gelu, nn.GELU("tanh"), F.relu, nn.SiLU()])
@pytest.mark.parametrize("gated", [False, True])
def test_ffn(act, gated):
    check(FFN(act, gated), torch.randn(2, 3, D, requires_grad=True), ops="ffn")


def test_ffn_drops_only_while_training():
    model, x = FFN(drop=0.5), torch.randn(2, 3, D)
    compiled = torch.compile(model, backend="llmkern_test")
    assert 0.2 < (compiled(x.expand(64, 2, 3, D).reshape(-1, D)) == 0).float().mean() < 0.8
    torch.testing.assert_close(torch.compile(model.eval(), backend="llmkern_test")(x), model(x))


class Norms(nn.Module):
    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.weight, self.spelling = nn.Parameter(torch.randn(D)), spelling

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling == "llama":
            h = x.to(torch.float32)
            h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
            return self.weight * h.to(x.dtype)
        if self.spelling == "gemma":
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * (1.0 + self.weight)
        if self.spelling == "root":
            return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + 1e-5)
        if self.spelling == "function":
            return F.rms_norm(x, (D,), self.weight, 1e-5)
        return F.layer_norm(x, (D,), self.weight)


@pytest.mark.parametrize("spelling", ["llama", "gemma", "root", "function", "layer"])
def test_norms(spelling):
    ops = "layer_norm" if spelling == "layer" else "rms_norm"
    check(Norms(spelling), torch.randn(2, 3, D, requires_grad=True), ops=ops)


def test_residual_adds_run_inside_the_norm():
    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(D)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            x = x + y
            return x + self.norm(x)

    check(Add(), *(torch.randn(2, 3, D, requires_grad=True) for _ in range(2)), ops="layer_norm")


class Head(nn.Module):
    def __init__(self, returns_logits: bool) -> None:
        super().__init__()
        self.head, self.returns = nn.Linear(D, 11), returns_logits

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        logits = self.head(x)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), target.view(-1), ignore_index=-1)
        return loss + logits.square().sum() if self.returns else loss


@pytest.mark.parametrize("returns", [False, True])
def test_loss(returns):
    x, target = torch.randn(2, 3, D, requires_grad=True), torch.randint(11, (2, 3))
    check(Head(returns), x, target, ops="linear cross_entropy" if returns else "linear_cross_entropy")


def test_writes_in_place_keep_their_order():
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(D, 24), nn.Linear(24, D)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            h = F.relu(self.a(x))
            x.add_(1.0)
            return self.b(h) + x

    model, x = Steps(), torch.randn(3, D)
    with torch.no_grad():
        out = torch.compile(model, backend="llmkern_test")(x)
        torch.testing.assert_close(out, model(x))


def test_hands_on_to_another_backend():
    check(FFN(), torch.randn(2, 3, D, requires_grad=True), ops="ffn", then="aot_eager")
    with pytest.raises(Exception, match="unknown option 'than'"):
        torch.compile(FFN(), backend="llmkern_test", options={"than": "eager"})(torch.randn(2, D))


@pytest.mark.slow
def test_hands_on_to_inductor():
    check(FFN(), torch.randn(2, 3, D, requires_grad=True), ops="ffn", then="inductor")


def test_lengths_that_change():
    compiled = torch.compile(FFN(), backend="llmkern_test", dynamic=True, fullgraph=True)
    for length in (3, 4, 7):
        assert compiled(torch.randn(2, length, D)).shape == (2, length, D)


def test_report_and_name():
    model = nn.Sequential(nn.LayerNorm(D), FFN())
    torch.compile(model, backend="llmkern_test")(torch.randn(2, D))
    assert {(e.path, e.now) for e in llmkern.backend.report.changed} == {
        ("0", "llmkern.nn.functional.layer_norm"),
        ("1.b", "llmkern.ops.ffn"),
    }
    points = {p.name: p for p in metadata.entry_points(group="torch_dynamo_backends")}
    if "llmkern" not in points:
        pytest.skip("installed before the entry point was there; `pip install -e .` again")
    assert points["llmkern"].load() is llmkern.backend
