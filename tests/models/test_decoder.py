"""Steps of generation in one C++ call against the same model op by op."""

import pytest
import torch
from torch import nn

import llmkern
from llmkern import _cpu, ops
from llmkern.models import GPT, GPTConfig, Llama, LlamaConfig
from llmkern.models.decoder import Decoder, why_not

SETS = [isa for isa in _cpu.INSTRUCTION_SETS if not isinstance(_cpu.load(isa), str)]
TINY = LlamaConfig(
    vocab_size=61, hidden_size=72, intermediate_size=104, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=24, max_position_embeddings=400,
)  # fmt: skip
LLAMAS = {
    "llama": {},
    "tied, biased": {
        "tie_word_embeddings": True, "attention_bias": True, "output_bias": True, "mlp_bias": True,
    },
    "mistral": {"sliding_window": 5},
    "qwen3": {"qk_norm": True, "head_dim": 32},
}  # fmt: skip
MODELS = {
    **{name: lambda changes=changes: Llama(_changed(**changes)) for name, changes in LLAMAS.items()},
    "gpt": lambda: GPT(GPTConfig(61, 400, 2, 3, 60)),
    "gpt, silu, no biases": lambda: GPT(GPTConfig(61, 400, 2, 3, 60, "silu", bias=False)),
}


def _changed(**changes: object) -> LlamaConfig:
    return LlamaConfig(**{**vars(TINY), **changes})


@pytest.fixture(autouse=True)
def seeded(strict):
    torch.manual_seed(0)


def random_model(name: str = "llama") -> nn.Module:
    model = MODELS[name]().eval()
    for key, p in model.named_parameters():
        nn.init.normal_(p, 1.0 if "norm" in key or "ln_" in key else 0.0, 0.15)
    return model


def by_ops(model: nn.Module, idx: torch.Tensor) -> torch.Tensor:
    """Logits after each of the sequences, without a cache."""
    with torch.no_grad(), ops.use("reference"):
        return model(idx)[0][:, -1].float()


@torch.no_grad()
def stepped(model: nn.Module, idx: torch.Tensor, prompt: int, **options: object) -> torch.Tensor:
    """The same by a prefill of `prompt` tokens and then steps, each of which must be one C++ call."""
    caches = model.new_caches(*idx.shape, **options)
    if prompt:
        model.next_logits(idx[:, :prompt], caches)
    with ops.dispatch.record() as calls:
        for i in range(prompt, idx.shape[1]):
            logits = model.next_logits(idx[:, i : i + 1], caches)
    assert not calls, calls
    return logits


def close(ours: torch.Tensor, truth: torch.Tensor, yardstick: torch.Tensor | None = None) -> None:
    """Within twice the error of the same in the working precision, or float32's."""
    error = (ours - truth).abs().max()
    allowed = 0.0 if yardstick is None else 2 * (yardstick - truth).abs().max()
    assert error <= allowed + 3e-5 * truth.abs().max(), (error, allowed)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("name", MODELS)
def test_dense(name, isa):
    model, idx = random_model(name), torch.randint(61, (3, 11))
    with ops.use(f"cpp:{isa}"):
        logits = stepped(model, idx, 6)
    close(logits, by_ops(model.double(), idx))


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize(
    "config", [llmkern.Int8WeightOnly(), llmkern.Int8WeightOnly(32, False), llmkern.Int4WeightOnly(32, False),
               llmkern.Int4WeightOnly(64), llmkern.Int4WeightOnly(None)], ids=str,
)  # fmt: skip
def test_codes(config, isa):
    """x in three digits of 8 bits is as good as float32: the weights, as rounded, are the truth."""
    model = Llama(_changed(hidden_size=192, intermediate_size=256)).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    llmkern.quantize_(model, config)
    idx = torch.randint(61, (2, 7))
    with ops.use(f"cpp:{isa}"):
        logits = stepped(model, idx, 3)
    model.double()
    close(logits, by_ops(model, idx))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Better than op by op, which rounds between ops."""
    model, idx = random_model("llama").to(dtype), torch.randint(61, (2, 9))
    logits = stepped(model, idx, 4)
    with torch.no_grad():
        yardstick = model(idx)[0][:, -1].float()
    close(logits, by_ops(model.double(), idx), yardstick)


@pytest.mark.parametrize("options", [{}, {"page_size": 16}, {"dtype": torch.int8}, {"dtype": torch.bfloat16}])
def test_long_and_kinds_of_caches(options):
    """More than one chunk of positions; in every kind of cache as good as op by op."""
    model, idx = random_model(), torch.randint(61, (2, 300))
    logits = stepped(model, idx, 290, **options)
    with torch.no_grad():
        caches = list(model.new_caches(2, 300, **options))  # a plain list: op by op
        model.next_logits(idx[:, :290], caches)
        for i in range(290, 300):
            yardstick = model.next_logits(idx[:, i : i + 1], caches)
    close(logits, by_ops(model.double(), idx), yardstick)


@torch.no_grad()
def test_ragged_and_many():
    """11 sequences of different lengths, more than a step takes at once: each as if alone."""
    model, lengths = random_model(), [1, 7, 300, 4, 19, 2, 5, 260, 3, 8, 6]
    texts = [torch.randint(61, (1, n + 1)) for n in lengths]
    caches = model.new_caches(len(texts), 301)
    for i, text in enumerate(texts):
        model.next_logits(text[:, :-1], caches.rows(i, i + 1))
    logits = model.next_logits(torch.cat([text[:, -1:] for text in texts]), caches)
    assert caches.lengths.tolist() == [[n + 1 for n in lengths]] * 2
    for i, text in enumerate(texts):
        alone = stepped(model, text, text.shape[1] - 1)
        torch.testing.assert_close(logits[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_greedy_tokens_are_the_same():
    model, prompt = random_model(), torch.randint(61, (2, 5))
    tokens = model.generate(prompt, 40, temperature=0)
    with ops.use("reference"):
        assert torch.equal(model.generate(prompt, 40, temperature=0), tokens)


def test_any_number_of_threads():
    model, idx = random_model(), torch.randint(61, (2, 280))
    llmkern.quantize_(model, llmkern.Int8WeightOnly())
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(stepped(model, idx, 277))
    torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


def test_nan_stays_in_its_sequence():
    model = random_model()
    llmkern.quantize_(model, llmkern.Int8WeightOnly())
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    idx = torch.tensor([[1, 2, 3], [4, 5, 7]])
    logits = stepped(model, idx, 0)
    assert logits[1].isnan().all() and not logits[0].isnan().any()


@torch.no_grad()
def test_sees_new_weights():
    """From the next prompt on, whatever way they changed."""
    model, idx = random_model(), torch.randint(61, (1, 6))
    before = stepped(model, idx, 5)
    model.model.layers[0].mlp.down_proj.weight.mul_(2)
    written = stepped(model, idx, 5)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight * 2)
    replaced = stepped(model, idx, 5)
    assert not torch.equal(before, written)
    torch.testing.assert_close(replaced, 2 * written)


def test_what_it_does_not_run():
    """Op by op then, and said so."""
    model, idx = random_model(), torch.randint(61, (1, 6))
    handle = model.lm_head.register_forward_hook(lambda *args: None)
    assert "lm_head has hooks" in why_not(model)
    with pytest.raises(ops.FallbackError, match="a step of generation runs op by op: lm_head has hooks"):
        stepped(model, idx, 5)
    handle.remove()
    assert why_not(model) is None
    assert "drops" in why_not(GPT(GPTConfig(61, 8, 1, 1, 8, dropout=0.5)))
    assert "plain" in why_not(GPT(GPTConfig(61, 8, 1, 1, 8), kernels=False))
    assert "float64" in why_not(random_model().double())


@torch.no_grad()
def test_refuses():
    model = random_model("gpt")
    decoder, caches = Decoder(model), model.new_caches(1, 2)
    with pytest.raises(ValueError, match="token 61 is out of range, expected 0 to 60"):
        decoder.step(torch.tensor([61]), caches)
    for _ in range(2):
        decoder.step(torch.tensor([1]), caches)
    with pytest.raises(ValueError, match="cache_seqlens has 2, with 1 new tokens, expected 0 to 2"):
        decoder.step(torch.tensor([1]), caches)
