"""Hugging Face models: the same outputs, gradients and generated tokens after `swap_`, and back again."""

import copy

import pytest
import torch

import llmkern
from llmkern.swap import hf

transformers = pytest.importorskip("transformers")
from hf_families import CAUSAL, COMMON, FAMILIES, FUSED_FFN, NORMS, build  # noqa: E402

GQA = {**COMMON, "num_key_value_heads": 2}


@pytest.fixture(autouse=True)
def quiet():
    llmkern.set_fallback("error")
    torch.manual_seed(0)
    yield
    llmkern.set_fallback("warn")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("training", [False, True])
def test_same_outputs_and_gradients(name: str, training: bool):
    model = build(name).train(training)
    plain = copy.deepcopy(model)
    report = llmkern.swap_(model)
    ids = torch.randint(3, 101, (2, 11))
    padding = torch.ones(2, 11, dtype=torch.int64)
    padding[0, :4] = 0
    for mask in (None, padding):
        outs = [m(ids, attention_mask=mask)[0] for m in (model, plain)]
        seen = torch.ones_like(padding, dtype=torch.bool) if mask is None else mask.bool()
        torch.testing.assert_close(outs[0][seen], outs[1][seen], rtol=1e-5, atol=2e-6)
        upstream = torch.randn_like(outs[0][seen])
        for m, out in zip((model, plain), outs):
            m.zero_grad()
            out[seen].backward(upstream)
        # a gradient that cancels to 0, as of the keys' bias, is a difference of terms as large as others
        scale = max(q.grad.abs().max().item() for q in plain.parameters())
        for (path, p), q in zip(model.named_parameters(), plain.parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5 * scale, msg=path)
    now = [e.now for e in report.changed]
    assert ("llmkern.nn.FFNKernel" in now) == (name in FUSED_FFN)
    assert ("llmkern.nn.RMSNormKernel" in now) == (name in NORMS)
    assert "attention 'llmkern'" in now


@pytest.mark.parametrize("name", CAUSAL)
def test_generate_with_a_cache(name: str):
    model = build(name).eval()
    ids = torch.randint(3, 101, (2, 7))
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    before = model.generate(ids, **options)
    with llmkern.swapped(model):
        assert torch.equal(model.generate(ids, **options), before)


def test_attention_dropout():
    model = build("Llama")
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    ids = torch.randint(3, 101, (1, 50))
    whole = model.eval()(ids)[0]
    llmkern.swap_(model)
    torch.manual_seed(0)
    first, second = model.train()(ids)[0], model(ids)[0]
    torch.manual_seed(0)
    assert torch.equal(model(ids)[0], first) and not torch.equal(first, second)
    torch.testing.assert_close(model.eval()(ids)[0], whole, rtol=1e-5, atol=1e-5)


def test_capped_scores():
    """Of a model whose scores reach the cap, and that divides them by its own number."""
    options = {**GQA, "head_dim": 8, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 2}
    model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**options)).eval()
    model.set_attn_implementation("eager")
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            torch.nn.init.normal_(linear.weight, std=0.5)
    ids = torch.randint(3, 101, (1, 9))
    before = model(ids)[0]
    llmkern.swap_(model)
    torch.testing.assert_close(model(ids)[0], before, rtol=1e-5, atol=1e-5)
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 4.0
    assert (model(ids)[0] - before).abs().max() > 0.01


@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_the_setting_before_comes_back(before):
    model = build("Llama")
    model.set_attn_implementation(before)
    llmkern.swap_(model)
    assert hf.implementation(model) == "llmkern" == hf.implementation(model.model)
    llmkern.restore_(model)
    assert hf.implementation(model) == before == hf.implementation(model.model)
    assert not hasattr(model, hf.BEFORE)


def test_sinks():
    options = {**GQA, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4}
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**options)).eval()
    model.set_attn_implementation("eager")
    for module in model.modules():
        if hasattr(module, "sinks"):
            torch.nn.init.normal_(module.sinks)
    ids = torch.randint(3, 101, (1, 9))
    before = model(ids)[0]
    llmkern.swap_(model)
    torch.testing.assert_close(model(ids)[0], before, rtol=1e-5, atol=1e-5)


def test_what_the_kernel_cannot_do_goes_to_the_models_own():
    attention = build("Llama").model.layers[0].self_attn
    q = torch.randn(1, 4, 5, 8)
    llmkern.set_fallback("error")
    with pytest.raises(llmkern.ops.FallbackError, match="its option position_bias is Tensor, expected None"):
        hf.attention(attention, q, q, q, None, position_bias=torch.zeros(1))
