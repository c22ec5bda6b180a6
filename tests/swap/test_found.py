"""Modules of unknown classes: taken only for what they are proved to be."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmkern
from llmkern.nn import found
from llmkern.nn.kernel_class import ROLES


class Norm(nn.Module):
    def __init__(self, plus: float = 0.0, power: float = 2.0) -> None:
        super().__init__()
        self.weight, self.eps, self.plus, self.power = nn.Parameter(torch.randn(16)), 1e-5, plus, power

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().pow(self.power).mean(-1, keepdim=True).add(self.eps).rsqrt()
        return x * scale * (self.weight + self.plus)


class FFN(nn.Module):
    def __init__(self, act=F.gelu, gated: bool = False, drop: float = 0.0, functional_drop: float = 0.0):
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 16)
        self.c = nn.Linear(16, 24) if gated else None
        self.act, self.drop, self.functional_drop = act, nn.Dropout(drop), functional_drop

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.a(x)) * self.c(x) if self.c is not None else self.act(self.a(x))
        return self.drop(F.dropout(self.b(h), self.functional_drop, self.training))


class Linear(nn.Module):
    """x W + b or x Wᵀ + b, by `transposed`; its weight is square or not."""

    def __init__(self, transposed: bool, outputs: int = 24, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn((16, outputs) if transposed else (outputs, 16)))
        self.bias = nn.Parameter(torch.randn(outputs)) if bias else None
        self.transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        y = x @ (self.weight if self.transposed else self.weight.t())
        return y if self.bias is None else y + self.bias


@pytest.fixture(autouse=True)
def fresh():
    """Nothing is known from an earlier test."""
    torch.manual_seed(0)
    found._KNOWN.clear()


def agrees(module: nn.Module, kernel: str | None) -> None:
    """The swapped module gives what it gave; `kernel` names the class that it got, None for its own."""
    x = torch.randn(2, 5, 16, requires_grad=True)
    model = nn.ModuleList([module, nn.LayerNorm(16)])
    y = module(x)
    grads = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
    report = llmkern.swap_(model, linear=False)
    now = {e.path: e.now for e in report.changed}
    assert now.get("0") == (kernel and f"llmkern.nn.{kernel}")
    with llmkern.use("reference"):
        again = module(x)
    torch.testing.assert_close(again, y)
    for a, b in zip(torch.autograd.grad(again.square().sum(), [x, *module.parameters()]), grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("module", "kernel"), [
    (Norm(), "RMSNormKernel"), (Norm(plus=1.0), "RMSNormKernel"),
    (Norm(plus=0.5), None), (Norm(power=1.0), None),
])  # fmt: skip
def test_norms(module, kernel):
    agrees(module, kernel)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [16, 24])
@pytest.mark.parametrize("transposed", [False, True])
def test_linears(transposed, outputs, bias):
    module, x = Linear(transposed, outputs, bias), torch.randn(3, 16)
    was = found.recognise(module)
    assert was.mixin is found.LinearKernel and was.roles == {"transposed": transposed}
    torch.testing.assert_close(was.mixin.compute(module, x, **was.roles), module(x))


def test_restored_is_as_it_was():
    for module in (Norm(), Norm(plus=1.0), FFN(), FFN(F.silu, gated=True)):
        before, cls = dict(vars(module)), type(module)
        llmkern.swap_(module, strict=True)
        assert type(module) is not cls and hasattr(module, ROLES)
        llmkern.restore_(module)
        assert type(module) is cls and vars(module) == before


@pytest.mark.parametrize("act", [F.gelu, F.relu, F.silu, nn.GELU("tanh"), lambda x: F.relu(x).square()])
@pytest.mark.parametrize("gated", [False, True])
def test_ffn(act, gated):
    agrees(FFN(act, gated), "FFNKernel")


@pytest.mark.parametrize("act", [torch.tanh, F.elu, torch.sin])
def test_unknown_activations(act):
    agrees(FFN(act), None)


def test_dropout_nobody_sees():
    """Functional dropout shows only in training: the module is left alone."""
    model = nn.ModuleList([FFN(functional_drop=0.5), nn.LayerNorm(16)])
    report = llmkern.swap_(model, linear=False)
    assert [e.path for e in report.changed] == ["1"]


class Inner(FFN):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(self.act(self.a(x))))


@pytest.mark.parametrize(("cls", "place"), [(FFN, "last"), (Inner, "inner")])
def test_dropout_runs_in_the_op(cls, place):
    """Where it drops is seen, and there the op drops."""
    module = cls(drop=0.5)
    module.b.bias.data.fill_(3.0)
    llmkern.swap_(module, strict=True)
    assert {k: v for k, v in getattr(module, ROLES).items() if k in ("inner", "last")} == {
        "inner": None, "last": None, place: "drop"
    }  # fmt: skip
    x = torch.randn(500, 16)
    with torch.no_grad():
        zeros = (module(x) == 0).float().mean().item()
        assert zeros == pytest.approx(0.5 if place == "last" else 0.0, abs=0.05)
        assert not torch.equal(module(x), module(x))
        assert torch.equal(module.eval()(x), module(x))


def test_a_dropout_of_the_input_is_left_alone():
    class Early(FFN):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.act(self.a(self.drop(x))))

    module = Early(drop=0.5)
    assert not [e for e in llmkern.swap_(module).changed if e.path == ""]


@pytest.mark.parametrize("functional_drop", [0.0, 0.5])
def test_trying_leaves_no_trace(functional_drop):
    """Modes, gradients and random numbers are as before."""
    module = FFN(drop=0.5, functional_drop=functional_drop)
    module.act, module.drop.training = nn.GELU(), False
    state = torch.random.get_rng_state()
    llmkern.swap_(module)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert module.training and not module.drop.training and all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("scale", [1.0, 1e-3, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_roles_do_not_hang_on_values(scale, dtype):
    """With tiny or zero weights, or in bfloat16, gate and linear could be taken for one another."""
    module = FFN(F.silu, gated=True)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(scale)
    llmkern.swap_(module.to(dtype))
    roles = getattr(module, ROLES)
    assert (roles["linear_in"], roles["gate"], roles["linear_out"], roles["activation"]) == (
        "c",
        "a",
        "b",
        "silu",
    )


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_activations_in_sight_of_nobody(approximate):
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.gelu(self.up(x), approximate=approximate))

    module = Hidden()
    llmkern.swap_(module)
    assert getattr(module, ROLES)["activation"] == {"none": "gelu", "tanh": "gelu_tanh"}[approximate]
