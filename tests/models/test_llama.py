"""Llama against Hugging Face's models of the same shape."""

import pytest
import torch
from torch import nn

import llmkern
from llmkern.models import LLAMA_PRESETS, Llama, LlamaConfig, preset

transformers = pytest.importorskip("transformers")

# numbers of parameters as Hugging Face prints them for each release
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen3-0.6b": 596_049_920,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}
TINY = LlamaConfig(
    vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=48,
)  # fmt: skip
LLAMA3 = {**LLAMA_PRESETS["llama-3.2-1b"].rope_scaling, "original_max_position_embeddings": 16}
# ours, and the class of Hugging Face with what its config has beside the fields of the same name
FAMILY = {
    "llama": ({}, "Llama", {}),
    "tied": ({"tie_word_embeddings": True}, "Llama", {}),
    "biased": ({"attention_bias": True, "output_bias": True, "mlp_bias": True}, "Llama", {}),
    "llama3": ({"rope_scaling": LLAMA3}, "Llama", {}),
    "linear": ({"rope_scaling": {"rope_type": "linear", "factor": 3.0}}, "Llama", {}),
    "mistral": ({"sliding_window": 5, "rope_theta": 5e3}, "Mistral", {}),
    "qwen2": ({"attention_bias": True}, "Qwen2", {}),
    "qwen3": ({"qk_norm": True, "head_dim": 32, "tie_word_embeddings": True}, "Qwen3", {}),
}


@pytest.fixture(autouse=True)
def seeded(silent):
    torch.manual_seed(0)


def pair(name: str) -> tuple[Llama, nn.Module]:
    """Our model and theirs, with the same weights, all of them random."""
    changes, cls, more = FAMILY[name]
    config = LlamaConfig(**{**vars(TINY), "head_dim": None, **changes})
    fields = {k: v for k, v in vars(config).items() if k not in ("output_bias", "qk_norm", "rope_scaling")}
    rope = {"rope_theta": config.rope_theta, "rope_type": "default", **(config.rope_scaling or {})}
    theirs = getattr(transformers, f"{cls}Config")(
        **fields, **more, rope_parameters=rope, attn_implementation="eager", pad_token_id=0
    )
    ours, theirs = Llama(config).eval(), getattr(transformers, f"{cls}ForCausalLM")(theirs).eval()
    for p in ours.parameters():
        nn.init.normal_(p, std=0.2)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("name", FAMILY)
def test_is_hugging_faces(name):
    ours, theirs = pair(name)
    idx = torch.randint(61, (3, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, rtol=1e-4, atol=1e-4)
        # in float64 what is left is their float32 rotary tables
        expected = theirs.double()(idx).logits
        torch.testing.assert_close(ours.double()(idx)[0], expected, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_generates_as_hugging_face(name):
    """Greedy tokens, through the caches; what is behind a cache of 48 tokens is the next test's."""
    ours, theirs = pair(name)
    idx = torch.randint(1, 61, (2, 9))
    expected = theirs.generate(idx, max_new_tokens=30, do_sample=False, attention_mask=idx > 0)
    assert torch.equal(ours.generate(idx, 30, temperature=0)[:, : expected.shape[1]], expected)


def test_generates_beyond_its_context():
    """The window moves: each token sees the last block_size, at positions from 0 on."""
    model = Llama(TINY).eval()
    idx = torch.randint(61, (1, 47))
    out = model.generate(idx, 5, temperature=0)
    for i in range(47, 52):
        assert out[0, i] == model(out[:, max(0, i - 48) : i])[0][0, -1].argmax()


def test_gradients():
    ours, theirs = pair("llama")
    idx = torch.randint(61, (2, 20))
    loss = ours(idx, idx)[1]
    expected = nn.functional.cross_entropy(theirs(idx).logits.flatten(0, 1), idx.flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_init_and_learning():
    model = Llama(LlamaConfig(**{**vars(TINY), "num_hidden_layers": 8}))
    down = model.model.layers[0].mlp.down_proj.weight
    assert down.std().item() == pytest.approx(0.02 / 4, rel=0.1)
    model = Llama(TINY)
    optimizer = llmkern.optim.AdamW(model.parameters(), lr=1e-2)
    idx = torch.randint(61, (4, 17))
    for _ in range(30):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets(name):
    with torch.device("meta"):
        assert Llama(preset(name)).num_params() == PUBLISHED[name]


def test_all_presets_are_tested():
    assert set(LLAMA_PRESETS) == set(PUBLISHED)


def test_quantized():
    """A model whose linears were replaced runs their kernels, and is near what it was."""
    model = Llama(TINY).eval()
    idx = torch.randint(61, (2, 12))
    before = model(idx)[0]
    llmkern.quantize_(model, llmkern.Int8WeightOnly())
    llmkern.set_fallback("error")
    torch.testing.assert_close(model(idx)[0], before, rtol=0, atol=0.02)
    assert not torch.equal(model(idx)[0], before)


@pytest.mark.parametrize(
    "changes, match",
    [
        (
            {"num_key_value_heads": 3},
            "num_key_value_heads is 3, expected a divisor of num_attention_heads, 4",
        ),
        (
            {"hidden_size": 66, "head_dim": None},
            "num_attention_heads is 4, expected a divisor of hidden_size",
        ),
        ({"head_dim": 7}, "head_dim is 7, expected an even"),
        ({"sliding_window": 0}, "sliding_window is 0"),
    ],
)
def test_refuses(changes, match):
    with pytest.raises(ValueError, match=match):
        LlamaConfig(**{**vars(TINY), **changes})


def test_refuses_input():
    model = Llama(TINY)
    with pytest.raises(ValueError, match="Llama: idx has 49 tokens, expected at most block_size 48"):
        model(torch.zeros(1, 49, dtype=torch.int64))
