"""What swap_ cannot change it names and leaves alone: without values, quantised, compiled, overridden."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmkern
from llmkern.report import NoEffectWarning, SwapError

D = 16


@pytest.fixture(autouse=True)
def seed(silent):
    torch.manual_seed(0)
    torch._dynamo.reset()


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(D)), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return x * x.pow(2).mean(-1, keepdim=True).add(self.eps).rsqrt() * self.weight


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 24), nn.Linear(24, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    """Known classes, unknown ones, and a head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, D)
        self.norm, self.mine, self.mlp = nn.LayerNorm(D), RMSNorm(), MLP()
        self.head = nn.Linear(D, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mlp(self.mine(self.norm(self.embedding(ids)))))


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
EVERYTHING = {"norm", "mine", "mlp", "mlp.up", "mlp.down", "head"}


def left(report) -> dict[str, str]:
    return {e.path: e.note for e in report.left}


def test_on_meta():
    with torch.device("meta"):
        model = Model()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(SwapError, match="weight is on meta, without values"):
        llmkern.swap_(model, strict=True)
    with pytest.warns(NoEffectWarning, match="on meta"):
        notes = left(llmkern.swap_(model))
    assert set(notes) == EVERYTHING and all("on meta" in note for note in notes.values())
    assert [type(m) for m in model.modules()] == classes
    assert llmkern.swap_(model.to_empty(device="cpu")).changed  # with weights it is swapped


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization", "ignore:torch.quantize_per_tensor")
def test_quantised():
    model = Model()
    model.mlp = torch.ao.quantization.quantize_dynamic(model.mlp, {nn.Linear})
    model.head = nn.Linear(D, 11)
    model.head.weight = nn.Parameter(torch.zeros(11, D, dtype=torch.int8), requires_grad=False)
    report = llmkern.swap_(model)
    assert left(report) == {
        "mlp.up": "it is quantised by torch.ao", "mlp.down": "it is quantised by torch.ao",
        "head": "its weight is torch.int8, quantised",
    }  # fmt: skip
    assert {e.path for e in report.changed} == {"norm", "mine"}
    model.mlp(torch.randn(2, D))


def test_quantised_by_us():
    model = Model()
    before = llmkern.quantize_(model.mlp, llmkern.Int8WeightOnly())
    out = model(IDS)
    report = llmkern.swap_(model)
    assert before and {e.path for e in report.changed} == {"norm", "mine", "head"}
    torch.testing.assert_close(model(IDS), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("half", ["embedding", "head"])
def test_half_of_a_tied_pair(half):
    """Swapped alone, either half still trains the one weight of both."""
    model = Model()
    plain = copy.deepcopy(model)
    llmkern.swap_(model, filter_fn=lambda module, path: path in (half, "norm"))
    assert model.head.weight is model.embedding.weight
    for each in (plain, model):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            each(IDS).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(model.embedding.weight, plain.embedding.weight, rtol=1e-5, atol=1e-6)


def test_compiled():
    model = Model()
    out = model(IDS)
    compiled = torch.compile(model, backend="eager")
    with pytest.warns(NoEffectWarning, match="compiled"):
        assert left(llmkern.swap_(compiled)) == {"": "it is compiled; call swap_ before torch.compile"}
    assert torch.equal(compiled(IDS), out)
    model.mlp.compile(backend="eager")
    report = llmkern.swap_(model)
    assert left(report) == {"mlp": "it is compiled; call swap_ before module.compile()"}
    assert {e.path for e in report.changed} == {"norm", "mine", "head"}
    torch.testing.assert_close(model(IDS), out)


def test_scripted():
    model = Model()
    with pytest.warns(DeprecationWarning):
        model.norm = torch.jit.script(model.norm)
    assert "compiled by torch.jit" in left(llmkern.swap_(model))["norm"]
    model(IDS)


class Shifted(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def test_a_subclass_and_an_instance_with_a_forward_of_its_own():
    model = Model()
    model.norm = Shifted(D)
    model.mine.forward = lambda x: 2 * x
    model.mlp.up.forward = lambda x: 3 * F.linear(x, model.mlp.up.weight)
    out = model(IDS)
    report = llmkern.swap_(model)
    notes = left(report)
    assert "a subclass of LayerNorm" in notes["norm"] and "replaced" in notes["mine"]
    torch.testing.assert_close(model(IDS), out, rtol=1e-5, atol=1e-5)


def test_a_parametrised_weight():
    model = Model()
    torch.nn.utils.parametrizations.weight_norm(model.mlp.up)
    out = model(IDS)
    notes = left(llmkern.swap_(model))
    assert "a subclass of Linear" in notes["mlp.up"]
    torch.testing.assert_close(model(IDS), out, rtol=1e-5, atol=1e-5)
