"""Hugging Face folders in and out, against transformers itself on tiny random models."""

import json

import pytest
import torch

from llmkern.errors import UserError
from llmkern.models import GPT, GPTConfig, from_pretrained, save_pretrained
from llmkern.models.weights import INDEX, SINGLE

transformers = pytest.importorskip("transformers")

IDX = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


def _gpt2(**options):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=17,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        **options,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    for p in model.parameters():  # biases and norms that are not 0 and 1
        torch.nn.init.normal_(p, std=0.3)
    return model


LLAMAS = {
    "llama": {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama 3": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8,
        }
    },
    "mistral": {"sliding_window": 3},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
}  # fmt: skip


def _llama(name):
    torch.manual_seed(0)
    kind = {"llama with biases": "llama", "llama 3": "llama"}.get(name, name)
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        **LLAMAS[name],
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model


def _logits(theirs):
    with torch.no_grad():
        return theirs(IDX).logits


def _saved(theirs, folder, **options):
    theirs.save_pretrained(folder, **options)
    return folder


def _edit(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu", "silu"])
def test_gpt2_in(tmp_path, activation):
    theirs = _gpt2(activation_function=activation)
    ours = from_pretrained(_saved(theirs, tmp_path))
    assert not ours.training and ours.lm_head.weight is ours.transformer.wte.weight
    torch.testing.assert_close(ours(IDX)[0], _logits(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_gpt2_out(tmp_path, bias):
    torch.manual_seed(0)
    ours = GPT(GPTConfig(17, 16, 2, 2, 16, activation="gelu", bias=bias)).eval()
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.3)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(save_pretrained(ours, tmp_path)).eval()
    torch.testing.assert_close(_logits(theirs), ours(IDX)[0], rtol=1e-4, atol=1e-4)
    again = from_pretrained(tmp_path)
    assert torch.equal(again(IDX)[0], ours(IDX)[0])
    assert again.config.activation == "gelu" and again.config.n_embd == 16


@pytest.mark.parametrize("name", LLAMAS)
def test_llama_in_and_out(tmp_path, name):
    theirs = _llama(name)
    ours = from_pretrained(_saved(theirs, tmp_path / "theirs"))
    torch.testing.assert_close(ours(IDX)[0], _logits(theirs), rtol=1e-4, atol=1e-4)
    save_pretrained(ours, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(again) is type(theirs)
    assert torch.equal(_logits(again), _logits(theirs))


def test_tied_weight_twice_in_the_file(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = _saved(_llama("llama"), tmp_path)
    tensors = load_file(folder / SINGLE)
    assert "lm_head.weight" not in tensors
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / SINGLE)
    ours = from_pretrained(folder)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"use_sliding_window": True}, "some layers of this qwen2 have a sliding window"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "describes no model: .*'longrope', expected one of"),
        ({"tie_word_embeddings": False}, r"has no lm_head\.weight"),
    ],
)
def test_llama_configs_that_do_not_fit(tmp_path, fields, match):
    _edit(_saved(_llama("qwen2"), tmp_path), **fields)
    with pytest.raises(UserError, match=match):
        from_pretrained(tmp_path)


def test_several_files(tmp_path):
    theirs = _gpt2()
    ours = from_pretrained(_saved(theirs, tmp_path / "one"))
    sharded = _saved(theirs, tmp_path / "theirs", max_shard_size="8KB")
    assert (sharded / INDEX).exists() and not (sharded / SINGLE).exists()
    assert torch.equal(from_pretrained(sharded)(IDX)[0], ours(IDX)[0])
    save_pretrained(ours, tmp_path / "ours", shard_bytes=8000)
    assert len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 2
    assert torch.equal(from_pretrained(tmp_path / "ours")(IDX)[0], ours(IDX)[0])
    theirs_again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(_logits(theirs_again), _logits(theirs))
    save_pretrained(ours, tmp_path / "ours")  # one file now, and nothing left of the others
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {SINGLE, "config.json"}


def test_dtype(tmp_path):
    ours = from_pretrained(_saved(_gpt2().to(torch.bfloat16), tmp_path / "half"))
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    wide = from_pretrained(tmp_path / "half", dtype=torch.float32, dropout=0.0)
    assert {p.dtype for p in wide.parameters()} == {torch.float32} and wide.config.dropout == 0
    assert torch.equal(wide.lm_head.weight, ours.lm_head.weight.float())
    save_pretrained(wide, tmp_path / "again", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "again/config.json").read_text())["dtype"] == "bfloat16"


def test_old_names(tmp_path):
    """The first GPT-2 files have no prefix, and keep the causal mask."""
    from safetensors.torch import load_file, save_file

    theirs = _saved(_gpt2(), tmp_path)
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(theirs / SINGLE).items()}
    ours = from_pretrained(theirs)
    save_file({**tensors, "h.0.attn.bias": torch.ones(1, 1, 16, 16)}, theirs / SINGLE)
    assert torch.equal(from_pretrained(theirs)(IDX)[0], ours(IDX)[0])


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (
            {"model_type": "bloom"},
            "model_type is 'bloom', expected one of gpt2, llama, ",
        ),
        ({"n_inner": 48}, "n_inner is 48, expected None or 64"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06, expected 1e-05"),
        ({"activation_function": "tanh"}, "activation_function is 'tanh', expected 'gelu_new' or"),
        ({"n_layer": "2"}, "n_layer is '2', expected a whole number"),
        ({"n_head": 3}, "describes no model: .* n_head is 3"),
        ({"n_layer": 3}, r"has no transformer\.h\.2\."),
        ({"n_layer": 1}, r"has the weight transformer\.h\.1\..*, for which config.json has no place"),
        ({"vocab_size": 18}, r"wte\.weight has shape \(17, 16\), expected \(18, 16\)"),
    ],
)
def test_configs_that_do_not_fit(tmp_path, fields, match):
    _edit(_saved(_gpt2(), tmp_path), **fields)
    with pytest.raises(UserError, match=match) as error:
        from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def _cut(folder):
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:-100])


def _claim_much(folder):
    """A header that promises a terabyte."""
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes((2**40).to_bytes(8, "little") + data[8:])


def _only_pickle(folder):
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def _index_outside(folder):
    (folder / SINGLE).rename(folder.parent / "x.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"transformer.wte.weight": "../x.safetensors"}}))


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (_cut, "is no whole safetensors file"),
        (_claim_much, "is no whole safetensors file"),
        (_only_pickle, "pytorch_model.bin is a pickle, which is not opened"),
        (_index_outside, "names the file '../x.safetensors', which is not in that folder"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("[]"), "a JSON list, expected an object"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
    ],
)
def test_broken_folders(tmp_path, spoil, match):
    spoil(_saved(_gpt2(), tmp_path / "model"))
    with pytest.raises(UserError, match=match):
        from_pretrained(tmp_path / "model")


def test_what_cannot_be_saved(tmp_path):
    import llmkern

    with pytest.raises(ValueError, match="model is a Linear, expected one of GPT, Llama"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path)
    with pytest.raises(ValueError, match="activation is 'relu2', which Hugging Face's GPT-2 has not"):
        save_pretrained(GPT(GPTConfig(17, 16, 1, 2, 16, activation="relu2")), tmp_path)
    model = GPT(GPTConfig(17, 16, 1, 2, 32))
    llmkern.quantize_(model, llmkern.Int8WeightOnly(32))
    with pytest.raises(ValueError, match="qweight, expected plain linears"):
        save_pretrained(model, tmp_path)
