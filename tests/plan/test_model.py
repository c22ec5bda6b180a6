"""Parameters of published models to the last digit, and of Hugging Face's own modules."""

import json

import pytest

from llmkern.errors import UserError
from llmkern.models import GPT, GPTConfig, Llama, LlamaConfig, preset
from llmkern.plan import config

EXACT = {  # released checkpoints, or the closed form where only that is published
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt3-175b": 174_604_259_328,
    "bert-base": 109_482_240,
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-v3": 671_026_419_200,
    "palm-540b": 540_356_474_880,
    "bloom-176b": 176_247_271_424,
    "pythia-12b": 11_842_140_160,
}
SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 80, "max_position_embeddings": 64}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
MOE = {**GROUPED, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
FAMILIES = {
    "gpt2": GPT2,
    "bert": {**SMALL, "intermediate_size": 80, "max_position_embeddings": 64},
    "opt": {**SMALL, "ffn_dim": 80, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    "bloom": {"vocab_size": 96, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "gpt_neox": {**SMALL, "intermediate_size": 80},
    "llama": GROUPED,
    "mistral": {**GROUPED, "head_dim": 16},
    "llama with biases": {**GROUPED, "model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "phi3": {**GROUPED, "pad_token_id": 0},
    "olmo2": GROUPED,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 16},
    "gemma": {**GROUPED, "head_dim": 16},
    "gemma2": {**GROUPED, "head_dim": 16},
    "phi": {**SMALL, "intermediate_size": 80},
    "mixtral": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {**MOE, "num_experts": 4, "head_dim": 16},
    "deepseek_v3": {
        **MOE, **LATENT, "num_key_value_heads": 4, "n_routed_experts": 8, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_published(name: str):
    assert config.find(name).total == EXACT[name]


def test_active_parameters():
    """Mixtral: 12.9 B (its paper, section 3); DeepSeek-V3: 37 B (its abstract)."""
    assert config.find("mixtral-8x7b").active == 12_879_925_248
    assert config.find("deepseek-v3").active == pytest.approx(37e9, rel=0.02)


@pytest.mark.parametrize(
    "shape",
    [
        preset("nano"),
        preset("nano", bias=False),
        LlamaConfig(96, 32, 80, 3, 4, 2, 16, qk_norm=True),
        LlamaConfig(96, 32, 80, 3, 4, 2, attention_bias=True, tie_word_embeddings=True),
        LlamaConfig(96, 32, 80, 3, 4, 4, output_bias=True, mlp_bias=True),
    ],
)
def test_our_own_models(shape: GPTConfig | LlamaConfig):
    module = (GPT if isinstance(shape, GPTConfig) else Llama)(shape)
    assert config.find(shape).total == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("kind", FAMILIES)
def test_hugging_face(kind: str, tmp_path):
    """The reader agrees with the module that transformers builds from the same configuration."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    fields = dict(FAMILIES[kind])
    settings = transformers.AutoConfig.for_model(fields.pop("model_type", kind), **fields)
    auto = transformers.AutoModel if kind == "bert" else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        module = auto.from_config(settings)
    settings.save_pretrained(tmp_path)
    model = config.find(tmp_path)
    router = sum(b.numel() for name, b in module.named_buffers() if "correction_bias" in name)
    assert model.total == sum(p.numel() for p in module.parameters()) + router
    assert not model.notes


def test_unknown_kind_is_told():
    model = config.read({**GROUPED, "model_type": "frontier", "rms_norm_eps": 1e-5})
    assert model.gated and "model_type 'frontier' is not known here" in model.notes[0]


def test_bad_input(tmp_path):
    with pytest.raises(UserError, match=r"model is 'llama-3.1-7b'.*llama-3\.1-70b"):
        config.find("llama-3.1-7b")
    with pytest.raises(UserError, match="layers is None, expected a number under one of num_hidden_layers"):
        config.read({"model_type": "llama", "hidden_size": 8})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as a"):
        config.find(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="holds a list"):
        config.find(tmp_path)
    with pytest.raises(UserError, match="heads is 4, kv_heads 3"):
        config.read({**GROUPED, "num_key_value_heads": 3})
    assert config.find(GPTConfig()).total == EXACT["gpt2"]
