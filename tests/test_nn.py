"""Each module of llmkern.nn against its parent in float64, and against its parent's own error."""

import copy
import inspect
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

import llmkern
from llmkern.nn import plain
from llmkern.ops import FallbackError, FallbackWarning


@pytest.fixture(autouse=True)
def silent():
    """Which backend runs is not the point here."""
    llmkern.set_fallback("silent")
    torch.manual_seed(0)
    yield
    llmkern.set_fallback("warn")


def tensors(out) -> list[Tensor]:
    return [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]


def results(module: nn.Module, args: tuple, kwargs: dict, dtype: torch.dtype) -> list[Tensor]:
    """Outputs, and gradients of all inputs and parameters, of a copy of `module` in `dtype`."""

    def prepare(value):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if value not in made:
            made[value] = value.detach().to(dtype).requires_grad_(value.requires_grad)
        return made[value]  # query, key and value stay one tensor where they were

    made: dict[Tensor, Tensor] = {}
    module = copy.deepcopy(module).to(dtype)
    outs = tensors(module(*map(prepare, args), **{k: prepare(v) for k, v in kwargs.items()}))
    weights = [torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(dtype) for o in outs]
    torch.autograd.backward(outs, weights)
    grads = [t.grad for t in (*made.values(), *module.parameters()) if t.grad is not None]
    return [o.detach() for o in outs] + grads


def agree(ours: nn.Module, parent: type[nn.Module], *args, **kwargs) -> None:
    """`ours` in float32 is as close to its parent in float64 as its parent in float32 is."""
    theirs = copy.deepcopy(ours)
    llmkern.restore_(theirs)
    assert type(theirs) is parent
    assert list(ours.state_dict()) == list(theirs.state_dict())
    truth = results(theirs, args, kwargs, torch.float64)
    torch32, ours32 = (results(m, args, kwargs, torch.float32) for m in (theirs, ours))
    assert len(truth) == len(torch32) == len(ours32)
    for true, a, b in zip(truth, torch32, ours32):
        assert a.shape == b.shape and a.dtype == b.dtype
        error = (b - true).abs().max()
        assert error <= 2 * (a - true).abs().max() + 2e-6 * true.abs().max(), (
            f"error {error} of {true.abs().max()}"
        )


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


@pytest.mark.parametrize("affine", [True, False])
def test_norms(affine):
    for shape, dims in (((3, 7, 32), 32), ((4, 3, 5), (3, 5))):
        agree(llmkern.nn.LayerNorm(dims, 1e-3, affine), nn.LayerNorm, inputs(*shape))
        agree(llmkern.nn.RMSNorm(dims, 1e-3, affine), nn.RMSNorm, inputs(*shape))
    agree(llmkern.nn.LayerNorm(32, bias=False), nn.LayerNorm, inputs(6, 32))
    agree(llmkern.nn.RMSNorm(32), nn.RMSNorm, inputs(6, 32))


@pytest.mark.parametrize("norm", [llmkern.nn.LayerNorm(32), llmkern.nn.RMSNorm(32)])
def test_norm_residual(norm):
    x, residual = inputs(5, 32), inputs(5, 32)
    y, h = norm(x, residual)
    assert torch.equal(h, x + residual)
    torch.testing.assert_close(y, norm(x + residual))


@pytest.mark.parametrize("options", [
    {}, {"reduction": "sum"}, {"reduction": "none", "ignore_index": 2}, {"label_smoothing": 0.1},
    {"weight": torch.linspace(0.1, 1, 11)}, {"ignore_index": 2},
    {"weight": torch.linspace(0.1, 1, 11), "ignore_index": 2},
], ids=str)  # fmt: skip
def test_cross_entropy(options):
    loss = llmkern.nn.CrossEntropyLoss(**options)
    if "ignore_index" not in options:
        agree(loss, nn.CrossEntropyLoss, inputs(9, 11), torch.rand(9, 11))
    some = torch.randint(11, (9,))
    some[::4] = 2
    agree(loss, nn.CrossEntropyLoss, inputs(9, 11), some)
    agree(loss, nn.CrossEntropyLoss, inputs(2, 11, 4), torch.randint(11, (2, 4)))


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="needs torch 2.13")
@pytest.mark.parametrize("options", [
    {}, {"bias": True, "reduction": "sum"}, {"reduction": "none", "ignore_index": 2},
    {"weight": torch.linspace(0.1, 1, 11), "label_smoothing": 0.1}, {"out_features": (2,)},
], ids=str)  # fmt: skip
def test_linear_cross_entropy(options):
    loss = llmkern.nn.LinearCrossEntropyLoss(16, 11, **options)
    shape = (9, *options.get("out_features", ()))
    agree(loss, nn.LinearCrossEntropyLoss, inputs(9, 16), torch.randint(11, shape))
    if options == {}:
        agree(loss, nn.LinearCrossEntropyLoss, inputs(9, 16), torch.rand(9, 11))
        loss.z_loss = 1e-2
        x, target = inputs(9, 16), torch.randint(11, (9,))
        lse = loss.linear(x).logsumexp(-1)
        expected = nn.functional.cross_entropy(loss.linear(x), target) + 1e-2 * lse.square().mean()
        torch.testing.assert_close(loss(x, target), expected)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [
    {}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 12, "vdim": 20},
], ids=str)  # fmt: skip
def test_multihead_attention(options, batch_first):
    attention = llmkern.nn.MultiheadAttention(16, 4, batch_first=batch_first, **options)
    for bias in (attention.in_proj_bias, attention.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    batch, length, source = 3, 5, 7
    for mask in masks(batch * 4, length, source):
        for padding in paddings(batch, source):
            q, k = inputs(batch, length, 16), inputs(batch, source, options.get("kdim", 16))
            v = inputs(batch, source, options.get("vdim", 16)) if options.get("vdim") else k
            if not batch_first:
                q, k, v = (t.detach().transpose(0, 1).requires_grad_() for t in (q, k, v))
            agree(
                attention, nn.MultiheadAttention, q, k, v,
                attn_mask=mask, key_padding_mask=padding, need_weights=False,
            )  # fmt: skip


def masks(batch_heads: int, length: int, source: int) -> list[Tensor | None]:
    """In which every query sees the first key."""
    keep_first = torch.arange(source) == 0
    flat = (torch.rand(length, source) < 0.4) & ~keep_first
    deep = (torch.rand(batch_heads, length, source) < 0.4) & ~keep_first
    return [
        None,
        flat,
        deep,
        torch.randn(length, source),
        torch.zeros(deep.shape).masked_fill(deep, -math.inf),
    ]


def paddings(batch: int, source: int) -> list[Tensor | None]:
    padding = torch.arange(source).expand(batch, source) >= torch.tensor([[source], [3], [1]])
    return [None, padding, torch.zeros(padding.shape).masked_fill(padding, -math.inf)]


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_multihead_self_attention(options):
    attention = llmkern.nn.MultiheadAttention(16, 4, batch_first=True, **options)
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    x = inputs(3, 6, 16)
    for padding in paddings(3, 6):
        for kwargs in ({}, {"attn_mask": causal, "is_causal": True}, {"attn_mask": causal < 0}):
            kwargs = {**kwargs, "key_padding_mask": padding, "need_weights": False}
            agree(attention, nn.MultiheadAttention, x, x, x, **kwargs)
    one = inputs(6, 16)
    for mask in (None, causal, torch.randn(4, 6, 6)):
        agree(attention, nn.MultiheadAttention, one, one, one, attn_mask=mask, need_weights=False)


@pytest.mark.parametrize("average", [True, False])
def test_attention_weights(average):
    attention, x = llmkern.nn.MultiheadAttention(16, 4), inputs(5, 2, 16)
    agree(attention, nn.MultiheadAttention, x, x, x, average_attn_weights=average)


def test_attention_refuses():
    attention, x = llmkern.nn.MultiheadAttention(16, 4, batch_first=True), torch.randn(2, 5, 16)
    cases = [
        ((x, x, x[0]), {}, "dimensions"),
        ((x[..., :8], x, x), {}, "widths"),
        ((x, x, x[:, :3]), {}, "batch and length"),
        ((x, x, x), {"attn_mask": torch.zeros(5, 4)}, "attn_mask has shape"),
        ((x, x, x), {"key_padding_mask": torch.zeros(5)}, "key_padding_mask has shape"),
        ((x, x, x), {"is_causal": True}, "is_causal"),
    ]
    for args, kwargs, match in cases:
        with pytest.raises(ValueError, match=match):
            attention(*args, need_weights=False, **kwargs)


ACTIVATIONS = ["relu", "gelu", nn.GELU("tanh"), nn.SiLU(), nn.Tanh()]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layer(norm_first, activation):
    for batch_first in (True, False):
        layer = llmkern.nn.TransformerEncoderLayer(
            16, 4, 40, 0.0, activation, norm_first=norm_first, batch_first=batch_first
        )
        causal = nn.Transformer.generate_square_subsequent_mask(6)
        x = inputs(3, 6, 16) if batch_first else inputs(6, 3, 16)
        padding = paddings(3, 6)[1]
        for kwargs in ({}, {"src_mask": causal, "is_causal": True}, {"src_key_padding_mask": padding}):
            agree(layer, nn.TransformerEncoderLayer, x, **kwargs)


def drops_like_torch(ours: nn.Module, x: Tensor, runs: int = 400) -> None:
    """Other random numbers than the parent's, but outputs of the same mean and variance."""
    theirs = copy.deepcopy(ours)
    llmkern.restore_(theirs)
    torch.manual_seed(3)
    with torch.no_grad():
        samples = [torch.stack([module(x) for _ in range(runs)]).double() for module in (ours, theirs)]
    assert not torch.equal(samples[0][0], samples[0][1])
    mean, other = (s.mean(0) for s in samples)
    variance, other_variance = (s.var(0) for s in samples)
    noise = ((variance + other_variance) / runs).sqrt()
    assert ((mean - other).abs() <= 5 * noise + 1e-6).all()
    assert variance.mean().item() == pytest.approx(other_variance.mean().item(), rel=0.1)


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layer_dropout(norm_first):
    layer = llmkern.nn.TransformerEncoderLayer(16, 4, 40, 0.3, norm_first=norm_first)
    drops_like_torch(layer, torch.randn(3, 2, 16))


class OfItself(nn.Module):
    """A MultiheadAttention that takes one tensor, and gives one."""

    def __init__(self, attention: nn.MultiheadAttention):
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def test_attention_dropout():
    x = torch.randn(2, 6, 16)
    drops_like_torch(OfItself(llmkern.nn.MultiheadAttention(16, 4, dropout=0.4)), x)
    attention = llmkern.nn.CausalSelfAttention(16, 4, dropout=0.4)
    attention.resid_dropout.p = 0.0
    drops_like_torch(attention, x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoder_layer_in_eval():
    """torch's encoder makes nested tensors of padding; its layer has a fast path of its own."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 40, batch_first=True), 2).eval()
    x, padding = torch.randn(3, 6, 16), paddings(3, 6)[1]
    with torch.no_grad():
        before = encoder(x), encoder(x, src_key_padding_mask=padding)
        llmkern.swap_(encoder)
        torch.testing.assert_close((encoder(x), encoder(x, src_key_padding_mask=padding)), before)


@pytest.mark.parametrize("activation", plain.ACTIVATIONS)
def test_mlp(activation):
    agree(llmkern.nn.MLP(16, 40, activation), plain.MLP, inputs(2, 5, 16))
    agree(llmkern.nn.MLP(16, None, activation, bias=False), plain.MLP, inputs(7, 16))


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias):
    agree(llmkern.nn.Linear(24, 37, bias), nn.Linear, inputs(2, 5, 24))


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "reglu"])
def test_gated_mlp(activation):
    agree(llmkern.nn.GatedMLP(24, None, activation), plain.GatedMLP, inputs(2, 5, 24))
    agree(llmkern.nn.GatedMLP(16, 40, activation, bias=True), plain.GatedMLP, inputs(7, 16))


@pytest.mark.parametrize("layers", [
    (nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 5)),
    (nn.Linear(8, 24, bias=False), nn.ReLU(inplace=True), nn.Dropout(0.0), nn.Linear(24, 5)),
    (nn.Linear(8, 24), nn.SiLU(), nn.Dropout(0.0), nn.Linear(24, 5), nn.Dropout(0.0)),
], ids=len)  # fmt: skip
def test_sequential(layers):
    agree(llmkern.nn.SequentialFFN(*layers), nn.Sequential, inputs(2, 3, 8))


def test_dropout():
    for p in (0.0, 0.4):
        layers = nn.Linear(8, 24), nn.GELU(), nn.Dropout(p), nn.Linear(24, 5), nn.Dropout(0.4)
        drops_like_torch(llmkern.nn.SequentialFFN(*layers), torch.randn(2, 3, 8))
    for module in (llmkern.nn.MLP(16, dropout=0.4), llmkern.nn.Block(16, 4, dropout=0.4)):
        drops_like_torch(module, torch.randn(2, 3, 16))


@pytest.mark.parametrize("options", [{}, {"n_kv_head": 2}, {"n_kv_head": 1}, {"bias": False}], ids=str)
def test_causal_self_attention(options):
    agree(llmkern.nn.CausalSelfAttention(32, 4, **options), plain.CausalSelfAttention, inputs(2, 9, 32))


def test_block():
    block = llmkern.nn.Block(32, 4)
    agree(block, plain.Block, inputs(2, 9, 32))
    norm, attention, mlp = llmkern.nn.Block.parts
    assert [type(m) for m in block.children()] == [norm, attention, norm, mlp]


BUILD = {
    "Linear": lambda: (llmkern.nn.Linear(16, 40), torch.randn(2, 5, 16)),
    "LayerNorm": lambda: (llmkern.nn.LayerNorm(16), torch.randn(2, 5, 16)),
    "RMSNorm": lambda: (llmkern.nn.RMSNorm(16), torch.randn(2, 5, 16)),
    "CrossEntropyLoss": lambda: (llmkern.nn.CrossEntropyLoss(), torch.randn(9, 11), torch.arange(9)),
    "LinearCrossEntropyLoss": lambda: (
        llmkern.nn.LinearCrossEntropyLoss(16, 11), torch.randn(9, 16), torch.arange(9),
    ),
    "MultiheadAttention": lambda: (
        llmkern.nn.MultiheadAttention(16, 4), *[torch.randn(5, 2, 16)] * 3, None, False,
    ),
    "TransformerEncoderLayer": lambda: (
        llmkern.nn.TransformerEncoderLayer(16, 4, 40, 0), torch.randn(5, 2, 16),
    ),
    "SequentialFFN": lambda: (
        llmkern.nn.SequentialFFN(nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 16)), torch.randn(5, 16),
    ),
    "CausalSelfAttention": lambda: (llmkern.nn.CausalSelfAttention(16, 4), torch.randn(2, 5, 16)),
    "MLP": lambda: (llmkern.nn.MLP(16), torch.randn(2, 5, 16)),
    "GatedMLP": lambda: (llmkern.nn.GatedMLP(16), torch.randn(2, 5, 16)),
    "Block": lambda: (llmkern.nn.Block(16, 4), torch.randn(2, 5, 16)),
}  # fmt: skip


def test_build_covers_every_module():
    elsewhere = {
        "Embedding",
        "Dropout",
        "Softmax",
        "LogSoftmax",
        "RotaryEmbedding",
        "QuantLinear",
        "LlamaAttention",
        "LlamaBlock",
        "LlamaMLP",
    }  # tests/ops, tests/models
    no_modules = {"plain", "KVCache", "KVCaches"}
    assert sorted(BUILD) == sorted(set(llmkern.nn.__all__) - elsewhere - no_modules)


@pytest.mark.parametrize("name", BUILD)
def test_signature_and_pickle(name):
    module, *_ = BUILD[name]()
    parent = type(module).__mro__[1]
    assert list(inspect.signature(type(module)).parameters) == list(inspect.signature(parent).parameters)
    ours, theirs = (list(inspect.signature(cls.forward).parameters) for cls in (type(module), parent))
    assert ours[: len(theirs)] == theirs
    assert type(pickle.loads(pickle.dumps(module))) is type(module)


@pytest.mark.parametrize("name", BUILD)
def test_autocast(name):
    """The dtype that torch gives, and the values up to bfloat16's rounding."""
    module, *args = BUILD[name]()
    theirs = copy.deepcopy(module)
    llmkern.restore_(theirs)
    with torch.autocast("cpu", torch.bfloat16):
        ours, expected = (tensors(m(*args))[0] for m in (module, theirs))
    assert ours.dtype == expected.dtype
    torch.testing.assert_close(ours, expected, rtol=0.02, atol=0.02)
    if ours.requires_grad:
        ours.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in module.parameters())


@pytest.mark.parametrize("name", BUILD)
def test_compile(name):
    torch._dynamo.reset()
    module, *args = BUILD[name]()
    outs, grads = [], []
    for run in (module, torch.compile(module, backend="aot_eager", fullgraph=True)):
        module.zero_grad()
        x = args[0].clone().requires_grad_()
        same = [x if a is args[0] else a for a in args]
        outs.append(tensors(run(*same))[0])
        outs[-1].sum().backward()
        grads.append([x.grad, *(p.grad.clone() for p in module.parameters())])
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=0)
    torch.testing.assert_close(grads[1], grads[0])


def test_falls_back_aloud():
    """What torch computes is said, with the reason."""
    x = torch.randn(3, 4, 16)
    attention = llmkern.nn.MultiheadAttention(16, 4, dropout=0.1)
    hooked = llmkern.nn.MLP(16)
    hooked.c_fc.register_forward_hook(lambda *args: None)
    cases = [
        (lambda: attention(x, x, x), "need_weights=True"),
        (lambda: hooked(x), "c_fc has hooks"),
        (lambda: llmkern.nn.CrossEntropyLoss()(torch.randn(2, 3), torch.rand(2, 3)), "torch.float32"),
        (
            lambda: llmkern.nn.LinearCrossEntropyLoss(4, 3)(torch.randn(2, 4), torch.rand(2, 3)),
            "torch.float32",
        ),
    ]
    llmkern.set_fallback("error")
    for call, match in cases:
        with pytest.raises(FallbackError, match=match), llmkern.use("reference"):
            call()


def test_falls_back_aloud_when_compiled():
    torch._dynamo.reset()
    llmkern.set_fallback("warn")
    encoder = llmkern.nn.TransformerEncoderLayer(16, 4, 40, activation=nn.Tanh())
    with pytest.warns(FallbackWarning, match="feed-forward runs on the PyTorch reference"):
        torch.compile(encoder, backend="aot_eager", fullgraph=True)(torch.randn(3, 4, 16))


def test_hooks_of_children_run():
    block, seen = llmkern.nn.Block(16, 4), []
    for child in block.modules():
        if child is not block:
            child.register_forward_hook(lambda module, args, out: seen.append((module, out)))
    block(torch.randn(2, 5, 16))
    assert {module for module, _ in seen} == set(block.modules()) - {block}
    assert all(isinstance(out, Tensor) for _, out in seen)
