"""prove: it passes what is the same, and finds what is not."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmkern
from llmkern import ops
from llmkern.cli import main
from llmkern.models import GPT, GPTConfig
from llmkern.prove.judge import in_float64

CONFIG = GPTConfig(vocab_size=31, block_size=16, n_layer=2, n_head=2, n_embd=16, dropout=0.1)


@pytest.fixture
def model(strict) -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG, kernels=False)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(31, (2, 17), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same(model, batch, dtype):
    before = copy.deepcopy(model.state_dict())
    proof = llmkern.prove(model.to(dtype), batch, steps=3)
    assert proof.passed, str(proof)
    assert all(torch.equal(p, before[n].to(dtype)) for n, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and type(
        model.transformer.h[0]
    ).__module__.endswith("plain")
    assert proof.determinism["3 runs"][0] and proof.determinism["1, 2, 4 threads"][0]
    assert {row.name for row in proof.rows} >= {"output 0", "loss", "losses of 3 steps"}
    assert len([row for row in proof.rows if row.name.startswith("gradient of ")]) == len(
        list(model.parameters())
    )
    data = json.loads(json.dumps(proof.to_dict()))
    assert data["passed"] and len(data["rows"]) == len(proof.rows) and data["swapped"]["changed"]
    assert "verdict: the same" in str(proof)


def test_a_swapped_model_is_proved_too(model, batch):
    llmkern.swap_(model)
    assert llmkern.prove(model, batch, steps=1).passed
    assert type(model.transformer.h[0]) is llmkern.nn.Block


def wrong_forward(monkeypatch):
    monkeypatch.setattr(llmkern.nn.norm.ops, "layer_norm", broken(ops.layer_norm, lambda y: y * (1 + 1e-4)))


def wrong_gradient(monkeypatch):
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, g):
            return g * (1 + 1e-3)

    monkeypatch.setattr(llmkern.nn.ffn.ops, "ffn", broken(ops.ffn, Scaled.apply))


def random_bits(monkeypatch):
    noise = iter(range(1, 10**6))
    monkeypatch.setattr(
        llmkern.nn.ffn.ops, "ffn", broken(ops.ffn, lambda y: y + (next(noise) % 3) * 3e-7 * y.detach())
    )


def broken(op, change):
    def wrong(*args, **kwargs):
        out = op(*args, **kwargs)
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    return wrong


@pytest.mark.parametrize(
    ("fault", "words"),
    [(wrong_forward, "from float64"), (wrong_gradient, "gradient"), (random_bits, "different bits")],
)
def test_faults_are_found(model, batch, monkeypatch, fault, words):
    fault(monkeypatch)
    proof = llmkern.prove(model, batch, steps=1)
    assert not proof.passed and words in "; ".join(proof.failures()) and "NOT the same" in str(proof)


def test_without_a_loss_and_with_one_given(strict):
    model, x = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)), torch.randn(5, 8)
    assert llmkern.prove(model, x, steps=2).passed
    target = torch.randint(4, (5,))
    proof = llmkern.prove(model, x, lambda out, batch: F.cross_entropy(out, target), steps=2)
    assert proof.passed and proof.rows[0].name == "output 0"


@pytest.mark.filterwarnings("ignore::llmkern.report.NoEffectWarning")
def test_nothing_to_prove():
    proof = llmkern.prove(nn.Bilinear(3, 3, 2), (torch.randn(2, 3), torch.randn(2, 3)), steps=1)
    assert not proof.passed and "nothing was swapped" in str(proof)

    class Names(nn.Module):
        def forward(self, x):
            return "text"

    with pytest.raises(ValueError, match="no floating-point tensor"):
        llmkern.prove(Names(), torch.randn(2))


def test_float64_is_not_rounded_by_the_models_code():
    x = torch.randn(4, 8, dtype=torch.float64)
    with in_float64():
        for y in (x.float(), x.to(torch.float32), x.bfloat16(), torch.zeros_like(x, dtype=torch.float32) + x):
            assert y.dtype == torch.float64 and torch.equal(y, x)
        assert torch.softmax(x, -1, dtype=torch.float32).dtype == torch.ones(2).dtype == torch.float64
    assert torch.ones(2).dtype == torch.float32 and x.float().dtype == torch.float32


MODULE = """
import torch, llmkern
from llmkern.cli import main
from llmkern.models import GPT, GPTConfig

def make():
    return GPT(GPTConfig(vocab_size=31, block_size=16, n_layer=1, n_head=2, n_embd=16), kernels=False)

def nothing():
    return torch.nn.Bilinear(3, 3, 2), (torch.randn(2, 3), torch.randn(2, 3))
"""


@pytest.mark.filterwarnings("ignore::llmkern.report.NoEffectWarning")
def test_command(tmp_path, capsys, strict):
    file = tmp_path / "somebodys_code.py"
    file.write_text(MODULE)
    size = ["--batch", "1", "--length", "8", "--steps", "1"]
    assert main(["prove", f"{file}:make", *size]) == 0
    out = capsys.readouterr().out
    assert "llmkern.nn.Block" in out and "verdict: the same" in out and "1, 2, 4 threads" in out
    assert main(["prove", f"{file}:make", "--json", "--dtype", "bfloat16", *size]) == 0
    assert json.loads(capsys.readouterr().out)["passed"]
    assert main(["prove", f"{file}:nothing", *size]) == 1
    assert "nothing was swapped" in capsys.readouterr().out
    assert main(["prove", "gtp2"]) == 2 and "did you mean gpt2" in capsys.readouterr().err
