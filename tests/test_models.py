"""GPT and its presets."""

import math

import pytest
import torch
from torch import nn

import llmkern
from llmkern.models import GPT, PRESETS, GPTConfig, preset
from llmkern.ops.dispatch import record

# GPT-2: as released.  GPT-3: Brown et al. 2020, table D.1, to the digits printed there.
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt3-small": 125_226_240,
    "gpt3-medium": 355_871_744,
    "gpt3-large": 760_300_032,
    "gpt3-xl": 1_315_723_264,
    "gpt3-2.7b": 2_651_553_280,
    "gpt3-6.7b": 6_658_404_352,
    "gpt3-13b": 12_853_386_240,
    "gpt3-175b": 174_604_259_328,
}
TINY = GPTConfig(vocab_size=17, block_size=8, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture(autouse=True)
def silent():
    """Which backend runs is not the point here."""
    llmkern.set_fallback("silent")
    torch.manual_seed(0)
    yield
    llmkern.set_fallback("warn")


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count(name):
    with torch.device("meta"):
        assert GPT(preset(name)).num_params() == PUBLISHED[name]


def test_presets():
    assert set(PRESETS) == {*PUBLISHED, "nano", "shakespeare-char"}
    assert preset("gpt2", dropout=0.1) == GPTConfig(dropout=0.1)
    with pytest.raises(ValueError, match="'gpt5', expected one of nano"):
        preset("gpt5")


@pytest.mark.parametrize("kernels", [True, False])
def test_the_loss_alone(kernels: bool):
    """Loss and gradients of both ways are the same; on the kernels one op makes them, swapped or not."""
    model = GPT(TINY, kernels)
    idx, targets = torch.randint(17, (2, 3, 8))
    targets[0, 3] = -100
    for swapped in (kernels, not kernels):
        found = []
        for return_logits in (True, False):
            model.zero_grad()
            with record() as calls:
                logits, loss = model(idx, targets, return_logits=return_logits)
                loss.backward()
            assert (logits is None) == (not return_logits)
            fused = any(half.startswith("linear_cross_entropy") for half, _ in calls)
            assert fused == (swapped and not return_logits)
            found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        llmkern.restore_(model) if swapped else llmkern.swap_(model)
    with pytest.raises(ValueError, match="return_logits is False and targets is None"):
        model(idx, return_logits=False)


def test_the_loss_alone_with_a_hook_on_the_head():
    model, seen = GPT(TINY), []
    model.lm_head.register_forward_hook(lambda *args: seen.append(args[2].shape))
    model(*torch.randint(17, (2, 3, 8)), return_logits=False)
    assert seen == [(3, 8, 17)]


def test_kernels_and_plain_are_one_model():
    plain = GPT(TINY, kernels=False)
    torch.manual_seed(0)
    ours = GPT(TINY)
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters()))
    idx, targets = torch.randint(17, (2, 3, 8))
    (logits, loss), (expected, expected_loss) = ours(idx, targets), plain(idx, targets)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(loss, expected_loss)
    loss.backward()
    expected_loss.backward()
    for (name, p), q in zip(ours.named_parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)
    llmkern.swap_(plain)
    assert [type(m) for m in plain.modules()] == [type(m) for m in ours.modules()]
    assert torch.equal(plain(idx)[0], logits)
    llmkern.restore_(ours)
    assert torch.equal(ours(idx)[0], expected)


def test_init():
    model = GPT(GPTConfig(vocab_size=300, block_size=64, n_layer=8, n_head=2, n_embd=64))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.transformer.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    block = model.transformer.h[3]
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert block.mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not block.attn.c_attn.bias.any()
    idx, targets = torch.randint(300, (2, 4, 64))
    assert model(idx, targets)[1].item() == pytest.approx(math.log(300), abs=0.1)


def test_causal():
    model = GPT(TINY)
    idx = torch.randint(17, (1, 8))
    changed = idx.clone()
    changed[0, 5] = (idx[0, 5] + 1) % 17
    same = (model(idx)[0] == model(changed)[0]).all(-1)[0]
    assert same.tolist() == [True] * 5 + [False] * 3


def test_ignored_targets():
    model = GPT(TINY)
    idx, targets = torch.randint(17, (2, 3, 8))
    targets[:, 4:] = -100
    logits, loss = model(idx, targets)
    expected = nn.functional.cross_entropy(logits[:, :4].flatten(0, 1), targets[:, :4].flatten())
    torch.testing.assert_close(loss, expected)


def test_learns():
    model = GPT(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    idx = torch.randint(17, (4, 9))
    for _ in range(40):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5


def test_generate():
    model = GPT(TINY)
    prompt = torch.randint(17, (2, 3))

    def sample(**options):
        return model.generate(prompt, 12, generator=torch.Generator().manual_seed(1), **options)

    out = sample()
    assert out.shape == (2, 15) and out.dtype == prompt.dtype
    assert torch.equal(out[:, :3], prompt)
    assert torch.equal(out, sample())
    assert torch.equal(sample(top_k=1), sample(temperature=0))
    assert torch.equal(sample(temperature=1e-4), sample(temperature=0))
    assert torch.equal(sample(top_k=99), out)
    assert torch.equal(model.generate(prompt, 0), prompt)
    for options, match in (({"temperature": -1.0}, "temperature is -1"), ({"top_k": 0}, "top_k is 0")):
        with pytest.raises(ValueError, match=match):
            sample(**options)
    with pytest.raises(ValueError, match="at least one token"):
        model.generate(prompt[:, :0], 1)


def test_refuses():
    model = GPT(TINY)
    for idx, match in (
        (torch.zeros(2, 9, dtype=torch.int64), "9 tokens, expected at most block_size 8"),
        (torch.zeros(8, dtype=torch.int64), r"of shape \(8,\)"),
        (torch.zeros(2, 8), "torch.float32"),
    ):
        with pytest.raises(ValueError, match=match):
            model(idx)
    with pytest.raises(ValueError, match="n_head is 3, expected a divisor of n_embd, 16"):
        GPT(GPTConfig(n_head=3, n_embd=16))
    with pytest.raises(ValueError, match="'tanh', expected one of relu"):
        GPT(GPTConfig(activation="tanh"))
    with pytest.raises(IndexError, match="target 17 is out of range"):
        model(torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[3, 17]]))


def test_meta():
    """A planner runs models that no machine could hold."""
    with torch.device("meta"):
        model = GPT(preset("gpt3-13b"))
        idx = torch.zeros(1, 2048, dtype=torch.int64)
        logits, loss = model(idx, idx)
        loss.backward()
    assert logits.shape == (1, 2048, 50257)
    assert all(p.grad.shape == p.shape for p in model.parameters())


def test_compile():
    model = GPT(TINY)
    idx, targets = torch.randint(17, (2, 3, 8))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(idx, targets), model(idx, targets), rtol=0, atol=0)


def test_dropout_trains():
    model = GPT(GPTConfig(vocab_size=17, block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.5))
    idx = torch.randint(17, (3, 8))
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])
