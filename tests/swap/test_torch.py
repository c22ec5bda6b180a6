"""swap_, restore_, swapped and explain: nothing but the class of the chosen modules changes."""

import copy
import io
import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmkern
from llmkern.report import NoEffectWarning, SwapError


@pytest.fixture(autouse=True)
def silent():
    """Which backend runs is not the point here."""
    llmkern.set_fallback("silent")
    torch.manual_seed(0)
    yield
    llmkern.set_fallback("warn")


class Classifier(nn.Module):
    """A user's model with everything that can be swapped in torch.nn."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 40, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=False)
        self.pool = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Dropout(0.0), nn.Linear(24, 7))
        self.norm = nn.RMSNorm(7)
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        h = self.encoder(x)  # (B, S, 16)
        h = self.pool(h[:, :1], h, h, need_weights=False)[0]
        return self.loss(self.norm(self.head(h[:, 0])), target)


@pytest.fixture
def model() -> Classifier:
    return Classifier()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 5, 16), torch.randint(7, (3,))


def classes(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


def test_swaps_everything(model, batch):
    before = model(*batch)
    report = llmkern.swap_(model)
    torch.testing.assert_close(model(*batch), before)
    assert len(report.changed) == 2 * 4 + 1 + 1 + 1 + 1 + 1
    assert not report.left
    assert all(e.now.startswith("llmkern.nn.") and e.was.startswith("torch.nn.") for e in report.changed)


def test_same_parameters_keys_buffers_and_mode(model):
    model.eval()
    parameters, keys = list(model.named_parameters()), list(model.state_dict())
    llmkern.swap_(model)
    assert [(n, id(p)) for n, p in model.named_parameters()] == [(n, id(p)) for n, p in parameters]
    assert list(model.state_dict()) == keys
    assert not any(m.training for m in model.modules())
    model.load_state_dict(Classifier().state_dict())


def test_restore_is_exact(model, batch):
    before, was = model(*batch), classes(model)
    changed = llmkern.swap_(model).changed
    assert [(e.path, e.now, e.was) for e in llmkern.restore_(model).changed] == [
        (e.path, e.was, e.now) for e in changed
    ]
    assert classes(model) == was
    assert torch.equal(model(*batch), before)


def test_swapped_restores_even_after_an_error(model, batch):
    model.norm.__class__ = llmkern.nn.RMSNorm  # was already there, so it stays
    was = classes(model)
    with pytest.raises(KeyError), llmkern.swapped(model, loss=False) as report:
        assert type(model.pool) is llmkern.nn.MultiheadAttention
        assert type(model.loss) is nn.CrossEntropyLoss
        assert report.changed
        raise KeyError
    assert classes(model) == was


def test_idempotent(model, recwarn):
    llmkern.swap_(model)
    now = classes(model)
    assert llmkern.swap_(model).entries == []
    assert classes(model) == now
    assert not [w for w in recwarn if issubclass(w.category, NoEffectWarning)]


def test_only_the_instance_is_touched(model, batch):
    sibling, function = Classifier(), F.scaled_dot_product_attention
    was, before = classes(sibling), sibling(*batch)
    llmkern.swap_(model)
    assert classes(sibling) == was == classes(Classifier())
    assert torch.equal(sibling(*batch), before)
    assert F.scaled_dot_product_attention is function


def test_hooks_stay(model, batch):
    seen = []
    for name in (
        "norm",
        "pool",
        "head",
        "encoder.layers.0",
        "encoder.layers.0.norm1",
        "encoder.layers.1.linear1",
    ):
        model.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append(module))
    llmkern.swap_(model)
    model(*batch)
    assert len(seen) == 6


def test_copies_and_files_keep_the_swap(model, batch):
    llmkern.swap_(model)
    expected, buffer = model(*batch), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert classes(other) == classes(model)
        assert torch.equal(other(*batch), expected)


def test_optimizer_made_before_trains_the_swapped_model(model, batch):
    twin = copy.deepcopy(model)
    losses = []
    for each in (model, twin):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-2)
        if each is model:
            llmkern.swap_(each)
        for _ in range(5):
            optimizer.zero_grad()
            loss = each(*batch)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_kinds_and_filter(model):
    report = llmkern.swap_(model, attention=False, ffn=False, loss=False, linear=False)
    assert {e.was for e in report.changed} == {"torch.nn.LayerNorm", "torch.nn.RMSNorm"}
    report = llmkern.swap_(model, filter_fn=lambda module, path: path.startswith("encoder.layers.1"))
    assert {e.path for e in report.changed} == {"encoder.layers.1", "encoder.layers.1.self_attn"}


class MyNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_leaves_alone_what_it_cannot_match(model):
    model.mine = MyNorm(16)
    model.tanh = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
    model.wide = nn.MultiheadAttention(600, 2)
    model.norm.forward = lambda x: x
    model.other = nn.Sequential(nn.Conv1d(3, 3, 1), nn.ReLU())
    was = classes(model)
    with pytest.raises(SwapError, match="subclass of LayerNorm"):
        llmkern.swap_(model, strict=True)
    assert classes(model) == was
    reasons = {e.path: e.note for e in llmkern.swap_(model).left}
    assert set(reasons) == {"mine", "tanh", "wide", "norm"}
    assert "subclass of LayerNorm" in reasons["mine"]
    assert "Tanh" in reasons["tanh"]
    assert "head dim is 300" in reasons["wide"]
    assert "forward was replaced" in reasons["norm"]
    assert type(model.mine) is MyNorm


def test_tells_what_torch_still_computes():
    model = nn.TransformerEncoderLayer(16, 4, 40, activation=torch.tanh)
    notes = {e.path: e.note for e in llmkern.swap_(model).changed}
    assert "activation" in notes[""] and notes["self_attn"] == ""
    assert type(model) is llmkern.nn.TransformerEncoderLayer


def test_nothing_to_swap_warns():
    with pytest.warns(NoEffectWarning, match="nothing in Conv1d was swapped"):
        assert llmkern.swap_(nn.Conv1d(3, 3, 1)).changed == []
    with pytest.warns(NoEffectWarning, match="no loss that"):
        llmkern.swap_(nn.LayerNorm(3), loss=True)
    with pytest.raises(ValueError, match="'fast'"):
        llmkern.swap_(nn.LayerNorm(3), loss="fast")


def test_eval_runs_the_kernels(model, batch, monkeypatch):
    """torch's fast path would bypass every child of the layer."""
    llmkern.swap_(model.eval())
    called = []
    for name in ("attention", "ffn", "layer_norm"):
        function = getattr(llmkern.ops, name)
        monkeypatch.setattr(
            llmkern.ops, name, lambda *a, f=function, n=name, **k: (called.append(n), f(*a, **k))[1]
        )
    with torch.no_grad():
        model(*batch)
    assert called.count("attention") == 3
    assert called.count("ffn") == 3
    assert called.count("layer_norm") == 5


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_encoder_and_decoder(batch):
    """nn.Transformer: cross-attention, causal and padding masks, the layers of torch's own decoder."""
    model = nn.Transformer(16, 4, 2, 2, 40, dropout=0.0, batch_first=True)
    masks = {
        "tgt_mask": model.generate_square_subsequent_mask(4),
        "tgt_is_causal": True,
        "src_key_padding_mask": torch.arange(5).expand(3, 5) > 2,
        "memory_key_padding_mask": torch.arange(5).expand(3, 5) > 2,
    }
    src, tgt = batch[0], torch.randn(3, 4, 16)
    before = model(src, tgt, **masks)
    expected = torch.autograd.grad(before.sum(), list(model.parameters()))
    with llmkern.swapped(model, strict=True):
        out = model(src, tgt, **masks)
        torch.testing.assert_close(out, before)
        grads = torch.autograd.grad(out.sum(), list(model.parameters()))
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-5)


def test_report_prints_and_is_json(model):
    model.mine = MyNorm(16)
    report = llmkern.swap_(model)
    text = str(report)
    assert ["encoder.layers.*.norm1", "2x", "torch.nn.LayerNorm", "llmkern.nn.LayerNorm"] in [
        line.split() for line in text.splitlines()
    ]
    assert "left alone" in text and "subclass of LayerNorm" in text
    assert text.endswith("13 modules changed, 1 left alone")
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


def test_explain():
    q = torch.randn(1, 2, 5, 8)
    with llmkern.use("reference"):
        assert str(llmkern.explain("attention", q, q, q)) == (
            "attention runs forward and backward on the PyTorch reference"
        )
    mask = torch.zeros(5, 5, requires_grad=True)
    for op in ("attention", llmkern.ops.attention, llmkern.ops.OPS["attention"]):
        told = llmkern.explain(op, q, q, q, mask)
        assert told.backward.backend == "reference"
    told = llmkern.explain("layer_norm", torch.randn(3, 4).double(), (4,))
    assert "float64" in told.forward.reason or "not built" in told.forward.reason
    assert llmkern.explain("cross_entropy", torch.randn(3, 4), torch.arange(3)).op == "cross_entropy"
    with pytest.raises(ValueError, match="'nothing'"):
        llmkern.explain("nothing", q)
    with pytest.raises(ValueError, match="attn_mask has shape"):
        llmkern.explain("attention", q, q, q, torch.zeros(4, 4))


def test_explain_computes_nothing():
    q = torch.empty(1, 64, 1 << 20, 128, device="meta")
    told = llmkern.explain("attention", q, q, q)
    assert told.forward.reason == "there are no fast kernels for device 'meta'"
