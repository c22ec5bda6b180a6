"""Weights in 8 and 4 bits: what the codes stand for, the layer, and quantize_ on whole models."""

import copy

import pytest
import torch
from guard_pages import guarded
from torch import nn

import llmkern
from llmkern import Int4WeightOnly, Int8WeightOnly, ops
from llmkern.models import GPT, GPTConfig
from llmkern.nn import QuantLinear
from llmkern.ops.quant_weight import pack, unpack

FORMATS = [
    (bits, group, symmetric, dtype)
    for bits in (8, 4)
    for group in (None, 32, 64, 96)
    for symmetric in (True, False)
    for dtype in (torch.float32, torch.float16)
]


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def by_formula(weight: ops.QuantWeight) -> list[list[float]]:
    """Element by element, as the head of quant_weight.py says it."""
    qweight, scales, mins = (None if t is None else t.tolist() for t in weight)
    nibbles = weight.qweight.dtype == torch.uint8
    depth = len(qweight[0]) * (2 if nibbles else 1)
    rows = []
    for n, codes in enumerate(qweight):
        row = []
        for k in range(depth):
            g = k * len(scales[n]) // depth
            q = codes[k // 32 * 16 + k % 16] if nibbles else codes[k]
            q = (q >> 4 if k % 32 >= 16 else q & 15) if nibbles else q
            low = mins[n][g] if mins else -8 * scales[n][g] if nibbles else 0.0
            row.append(q * scales[n][g] + low)
        rows.append(row)
    return rows


@pytest.mark.parametrize("bits, group, symmetric, dtype", FORMATS)
def test_dequantize_is_the_formula(bits, group, symmetric, dtype):
    weight = ops.quantize(randn(5, 192), bits, group, symmetric, dtype)
    exact = torch.tensor(by_formula(weight), dtype=torch.float64)
    assert torch.equal(ops.dequantize(*weight, torch.float64), exact)
    assert weight.scales.dtype == dtype and (weight.mins is None) == symmetric


@pytest.mark.parametrize("bits, group, symmetric, dtype", FORMATS)
def test_round_trip(bits, group, symmetric, dtype):
    """Each value within half a step; 4 bits without mins have no code for one end: there within a step."""
    w = randn(7, 192)
    weight = ops.quantize(w, bits, group, symmetric, dtype)
    error = (ops.dequantize(*weight, torch.float32) - w).abs().unflatten(1, (weight.scales.shape[1], -1))
    rounding = 256 * 2**-11 if dtype == torch.float16 and bits == 8 else 0.02
    step = 1.0 if bits == 4 and symmetric else 0.5
    assert (error <= (step + rounding) * weight.scales.float().abs()[..., None]).all()
    again = ops.quantize(ops.dequantize(*weight, torch.float32), bits, group, symmetric, dtype)
    if symmetric:  # the largest element has its own code: nothing moves
        assert torch.equal(again.qweight, weight.qweight)


def test_nibbles_lie_as_in_gguf():
    codes = torch.arange(64).remainder(16).to(torch.uint8)[None]
    packed = pack(codes)
    assert packed.shape == (1, 32) and packed[0, 3] == 3 | 3 << 4 and torch.equal(unpack(packed), codes)
    codes[0, 16] = 9
    assert pack(codes)[0, 0] == 9 << 4


def test_zeros_and_nan():
    for bits, symmetric in ((8, True), (8, False), (4, True), (4, False)):
        zero = ops.quantize(torch.zeros(2, 32), bits, None, symmetric)
        assert (ops.dequantize(*zero, torch.float32) == 0).all()
        w = randn(2, 64)
        w[1, 40] = torch.nan
        weight = ops.quantize(w, bits, 32, symmetric)
        nan = ops.dequantize(*weight, torch.float32).isnan()
        assert nan[1, 32:].all() and nan.sum() == 32


@pytest.mark.parametrize("args", [(8, None), (8, 32), (4, 32), (4, 64, False), (8, None, False)])
def test_exact_on_integers(args, backend: str, device: str, strict):
    """Small integers, scales of powers of two: every product and sum is exact, whatever the order."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randint(-8, 8, (37, 128), generator=generator)
    weight = ops.quantize(q.float(), *args)
    signs = torch.tensor([0.5, 0.25, -1.0, 2.0])
    scales = signs[torch.arange(weight.scales.numel()) % 4].view(weight.scales.shape).to(weight.scales)
    mins = None if weight.mins is None else (scales * 3).contiguous()
    weight = [None if t is None else t.to(device) for t in (weight.qweight, scales, mins)]
    dense = ops.dequantize(*weight, torch.float64)
    for rows in (1, 2, 3, 8, 15, 60):
        x = torch.randint(-4, 5, (rows, 128), generator=generator).to(device)
        with ops.use(backend):
            y = ops.quant_linear(x.float(), *weight)
        assert torch.equal(y.double(), x.double() @ dense.T), rows


@pytest.mark.parametrize("side", ["start", "end"])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_no_read_or_write_outside(rows: int, side: str, backend: str, device: str, strict):
    if device != "cpu":
        pytest.skip("guard pages are memory of the CPU")
    for d, args in ((37, (8,)), (96, (8, 32)), (96, (4, 32, False)), (32, (4,))):
        weight = ops.quantize(randn(19, d), *args)
        weight = [None if t is None else guarded(t, side) for t in weight]
        x, bias = guarded(randn(rows, d), side).requires_grad_(), guarded(randn(19), side)
        with ops.use(backend):
            ops.quant_linear(x, *weight, bias).sum().backward()


def test_rows_that_are_not_numbers(backend: str, device: str, strict):
    x = randn(4, 64).to(device)
    x[1, 63] = torch.nan
    for args in ((8,), (4, 32)):
        with ops.use(backend):
            y = ops.quant_linear(
                x, *(t if t is None else t.to(device) for t in ops.quantize(randn(9, 64), *args))
            )
        assert y[1].isnan().all() and not y[[0, 2, 3]].isnan().any()


W8, W4 = ops.quantize(torch.ones(4, 64)), ops.quantize(torch.ones(4, 64), 4, 32)
X = torch.ones(2, 64)
BAD = [
    ("integers", lambda: ops.quant_linear(X.long(), *W8), "input is torch.int64"),
    ("codes", lambda: ops.quant_linear(X, W8.qweight.float(), W8.scales), "qweight is torch.float32"),
    ("width", lambda: ops.quant_linear(X[:, :32], *W8), "qweight is torch.int8 of shape (4, 64)"),
    (
        "odd width",
        lambda: ops.quant_linear(X[:, :40], *W4),
        "input has 40 columns, expected a multiple of 32",
    ),
    ("no width", lambda: ops.quant_linear(X[:, :0], *W8), "input has 0 columns"),
    ("scales", lambda: ops.quant_linear(X, W8.qweight, W4.scales[:3]), "scales has shape (3, 2)"),
    ("groups", lambda: ops.quant_linear(X, W8.qweight, torch.ones(4, 4)), "scales has shape (4, 4)"),
    ("mins", lambda: ops.quant_linear(X, *W8[:2], torch.ones(4)), "mins is torch.float32 of shape (4,)"),
    ("scale dtype", lambda: ops.quant_linear(X, W8.qweight, W8.scales.int()), "scales is torch.int32"),
    ("bias", lambda: ops.quant_linear(X, *W8, torch.ones(5)), "bias is torch.float32 of shape (5,)"),
    ("device", lambda: ops.quant_linear(X, W8.qweight.to("meta"), W8.scales), "qweight is on meta"),
    ("bits", lambda: ops.quantize(X, 3), "bits is 3"),
    (
        "group size",
        lambda: ops.quantize(X, 4, 48),
        "group_size is 48, expected a multiple of 32 that divides 64",
    ),
    ("4 bits", lambda: ops.quantize(torch.ones(2, 40), 4), "a row has 40 elements"),
    ("weight", lambda: ops.quantize(torch.ones(2, 2, 4)), "weight is torch.float32 of shape (2, 2, 4)"),
    ("itself", lambda: llmkern.quantize_(nn.Linear(4, 4), Int8WeightOnly()), "model is a Linear"),
]


@pytest.mark.parametrize(("call", "words"), [c[1:] for c in BAD], ids=[c[0] for c in BAD])
def test_one_sentence(call, words: str):
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 200


# ---- modules and models ----------------------------------------------------------------------------


def gpt(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=61, block_size=32, n_layer=2, n_head=2, n_embd=64, **changes)).eval()


CONFIGS = [
    Int8WeightOnly(),
    Int8WeightOnly(32, False),
    Int4WeightOnly(32),
    Int4WeightOnly(64, symmetric=False),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_gpt(config, strict):
    """The quantised model is the model with the dequantised weights, in logits and in what it generates."""
    model = gpt()
    dense = copy.deepcopy(model)
    dense.lm_head.weight = nn.Parameter(dense.lm_head.weight.detach().clone())
    report = llmkern.quantize_(model, config)
    quantised = {path: m for path, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert len(report.changed) == len(quantised) == 9 and not report.left
    assert "transformer.wte keeps the weight" in next(e for e in report.entries if e.path == "lm_head").note
    for path, module in quantised.items():
        dense.get_submodule(path).weight.data = module.dequantize()
    idx = torch.arange(12).view(2, 6)
    torch.testing.assert_close(model(idx)[0], dense(idx)[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(model.generate(idx, 30, temperature=0), dense.generate(idx, 30, temperature=0))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_state_dict(config, tmp_path):
    model, idx = gpt(), torch.arange(6)[None]
    llmkern.quantize_(model, config)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    torch.manual_seed(1)
    other = GPT(model.config).eval()
    llmkern.quantize_(other, config)
    assert not torch.equal(other(idx)[0], model(idx)[0])
    other.load_state_dict(torch.load(tmp_path / "x.pt", weights_only=True))
    assert torch.equal(other(idx)[0], model(idx)[0])
    assert torch.equal(copy.deepcopy(other)(idx)[0], model(idx)[0])


def test_plain_gpt_and_swapped():
    """Before swap_ or after it."""
    idx = torch.arange(6)[None]
    models = [GPT(gpt().config, kernels=kernels).eval() for kernels in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        llmkern.quantize_(model, Int8WeightOnly())
    llmkern.swap_(models[1])
    torch.testing.assert_close(models[0](idx)[0], models[1](idx)[0], rtol=1e-5, atol=1e-5)


def test_casting_leaves_the_weight():
    layer = QuantLinear.from_linear(nn.Linear(64, 8), group_size=32)
    before = layer.dequantize()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.dequantize(), before) and layer.bias.dtype == torch.bfloat16
    assert layer(torch.ones(3, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    layer.to("meta")
    assert layer.scales.is_meta and layer.scales.dtype == torch.float16


def test_adapters_on_a_frozen_base():
    """x and the bias have gradients: those of the dequantised layer."""
    linear = nn.Linear(64, 40)
    layer = QuantLinear.from_linear(linear, bits=4, group_size=32)
    assert layer.bias is linear.bias
    linear.weight.data = layer.dequantize()
    grads = []
    for module in (layer, linear):
        x = randn(5, 64).requires_grad_()
        grads.append(torch.autograd.grad(module(x).square().sum(), (x, linear.bias)))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_what_is_left_alone():
    class Mine(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "odd": nn.Linear(40, 8),
            "groups": nn.Linear(96, 8),
            "meta": nn.Linear(128, 8, device="meta"),
            "mine": Mine(128, 8),
            "hooked": nn.Linear(128, 8),
            "good": nn.Linear(128, 8),
            "filtered": nn.Linear(128, 8),
            "encoder": nn.TransformerEncoderLayer(128, 2, 128),
            "norm": nn.LayerNorm(8),
        }
    )
    model["hooked"].register_forward_hook(lambda *args: None)
    report = llmkern.quantize_(model, Int4WeightOnly(128), lambda module, path: path != "filtered")
    reasons = {e.path: e.note for e in report.left}
    assert [e.path for e in report.changed] == ["good"] and type(model["filtered"]) is nn.Linear
    for path, words in {
        "odd": "divides 40", "groups": "divides 96", "meta": "on meta", "mine": "a subclass of Linear",
        "hooked": "hooks", "encoder.linear1": "TransformerEncoderLayer",
        "encoder.self_attn.out_proj": "a subclass",
    }.items():  # fmt: skip
        assert words in reasons[path], path
    assert "good" in str(report)
    model["encoder"].eval()(randn(3, 2, 128))
    with pytest.raises(TypeError, match="config is dict"):
        llmkern.quantize_(model, {})


def test_one_linear_in_two_places():
    shared = nn.Linear(32, 32)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    llmkern.quantize_(model, Int8WeightOnly())
    assert model[0] is model[2] and isinstance(model[0], QuantLinear)


def test_hugging_face_gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=61, n_positions=32, n_embd=64, n_layer=2, n_head=2)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    idx = torch.arange(6)[None]
    with torch.no_grad():
        before = model(idx).logits
        report = llmkern.quantize_(model, Int8WeightOnly())
        after = model(idx).logits
    assert len(report.changed) == 9 and not report.left  # 4 Conv1D a layer, and the head
    assert (after - before).abs().max() < 0.03 * before.abs().max()
    assert "bits=8" in repr(model.transformer.h[0].attn.c_attn)
    assert model.generate(idx, max_new_tokens=3, do_sample=False).shape == (1, 9)
