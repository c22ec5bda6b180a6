"""LoRA: what it computes, trains, and leaves behind."""

import copy

import pytest
import torch
from torch import nn

import llmkern
from llmkern.lora import lora_tensors
from llmkern.models import GPT, GPTConfig, Llama, LlamaConfig
from llmkern.nn.lora import LoRALinear, PlainLoRALinear, QuantLoRALinear

IDX = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
GPT_CONFIG = GPTConfig(17, 16, 2, 2, 32)
MODELS = {
    "GPT": lambda: GPT(GPT_CONFIG),
    "plain GPT": lambda: GPT(GPT_CONFIG, kernels=False),
    "Llama": lambda: Llama(LlamaConfig(17, 32, 64, 2, 4, 2, max_position_embeddings=16)),
    "torch": lambda: nn.Sequential(nn.Embedding(17, 32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 17)),
}


def _model(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def _logits(model):
    out = model(IDX)
    return out[0] if isinstance(out, tuple) else out


def _train(model, steps=5):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        logits = _logits(model)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDX[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize("name", MODELS)
def test_trains_merges_and_unmerges(name):
    llmkern.set_fallback("error")  # LoRA is no reason to warn
    try:
        model = _model(name)
        before = {key: t.clone() for key, t in model.state_dict().items()}
        classes = [type(m) for m in model.modules()]
        logits = _logits(model)
        llmkern.lora_(model, rank=4, alpha=8)
        assert torch.allclose(_logits(model), logits, atol=1e-5)  # B is 0
        assert {k.rsplit(".", 1)[-1] for k, p in model.named_parameters() if p.requires_grad} == {
            "lora_A",
            "lora_B",
        }
        first = _train(model, 1)
        assert _train(model, 20) < first - 0.1
        trained = {key: t.clone() for key, t in model.state_dict().items()}
        assert all(torch.equal(before[key], trained[key]) for key in before)  # frozen
        with torch.no_grad():
            apart = _logits(model)
            llmkern.merge_lora_(model)
            assert list(model.state_dict()) == list(before) and [type(m) for m in model.modules()] == classes
            assert not torch.equal(_logits(model), logits)
            torch.testing.assert_close(_logits(model), apart, rtol=1e-4, atol=1e-4)
            llmkern.unmerge_lora_(model)
            assert model.state_dict().keys() == trained.keys()
            assert all(torch.equal(t, trained[key]) for key, t in model.state_dict().items())
            assert torch.equal(_logits(model), apart)
    finally:
        llmkern.set_fallback("warn")


def test_formula():
    torch.manual_seed(0)
    for cls, now in ((nn.Linear, PlainLoRALinear), (llmkern.nn.Linear, LoRALinear)):
        model = nn.Sequential(cls(8, 6))
        llmkern.lora_(model, rank=2, alpha=3.0)
        linear = model[0]
        assert type(linear) is now
        nn.init.normal_(linear.lora_B)
        x = torch.randn(5, 8)
        expected = x @ (linear.weight + 1.5 * linear.lora_B @ linear.lora_A).T + linear.bias
        torch.testing.assert_close(linear(x), expected)
        assert set(lora_tensors(model)) == {"0.lora_A", "0.lora_B"}


def test_dropout_is_of_the_update_alone():
    model = nn.Sequential(nn.Linear(8, 6))
    llmkern.lora_(model, rank=2, dropout=0.5)
    x = torch.randn(5, 8)
    assert torch.equal(model(x), model(x))  # B is 0
    nn.init.normal_(model[0].lora_B)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_on_quantised_weights():
    model = _model("GPT")
    llmkern.quantize_(model, llmkern.Int8WeightOnly(), lambda module, path: path != "lm_head")
    llmkern.lora_(model, rank=4)
    assert type(model.transformer.h[0].mlp.c_fc) is QuantLoRALinear
    first = _train(model, 1)
    assert _train(model, 20) < first - 0.1
    with pytest.raises(ValueError, match="quantised weights, expected floating-point ones"):
        llmkern.merge_lora_(model)


def test_swap_and_restore_leave_it():
    model = _model("plain GPT")
    llmkern.lora_(model, rank=2)
    for p in lora_tensors(model).values():
        nn.init.normal_(p, std=0.1)
    expected = _logits(model)
    llmkern.swap_(model)
    torch.testing.assert_close(_logits(model), expected, rtol=1e-4, atol=1e-4)
    llmkern.merge_lora_(model)
    torch.testing.assert_close(_logits(model), expected, rtol=1e-4, atol=1e-4)
    llmkern.unmerge_lora_(model)
    llmkern.restore_(model)
    assert torch.equal(_logits(model), expected)
    assert torch.equal(_logits(copy.deepcopy(model)), expected)


def test_choice_and_report():
    model = _model("GPT")
    report = llmkern.lora_(model, rank=2, filter_fn=lambda module, path: path.endswith("c_attn"))
    assert [e.path for e in report.entries] == [f"transformer.h.{i}.attn.c_attn" for i in range(2)]
    tied = _model("GPT")
    report = llmkern.lora_(tied, rank=2, filter_fn=lambda module, path: True)
    assert [(e.path, "is shared with another module" in e.note) for e in report.left] == [("lm_head", True)]
    layer = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 1)
    with pytest.raises(ValueError, match="swap_ the layer first"):
        llmkern.lora_(layer)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"rank": 0}, "rank is 0, expected 1 or more"), ({"dropout": 1.0}, "dropout is 1.0")],
)
def test_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        llmkern.lora_(_model("torch"), **options)
    with pytest.raises(ValueError, match="it has no linear to take"):
        llmkern.lora_(nn.LayerNorm(3))
    model = _model("torch")
    llmkern.lora_(model)
    with pytest.raises(ValueError, match="has LoRA already"):
        llmkern.lora_(model)
