"""The loop against the plain way: the whole text through the model for every token."""

import pytest
import torch

from llmkern import Int8WeightOnly, quantize_
from llmkern.errors import UserError
from llmkern.generate import GREEDY, ModelEngine, Sampling, generate
from llmkern.models import GPT, GPTConfig, Llama, LlamaConfig
from llmkern.nn import KVCache

CONTEXT = 24
PROMPTS = [[1], [5, 3, 9, 2, 8], [4, 4], list(range(17)), [7, 1, 2, 3], [2] * 24]


@pytest.fixture(scope="module", params=["GPT", "Llama"])
def model(request):
    torch.manual_seed(0)
    if request.param == "GPT":
        model = GPT(GPTConfig(17, CONTEXT, 2, 2, 32)).eval()
    else:
        model = Llama(LlamaConfig(17, 32, 48, 2, 4, 2, max_position_embeddings=CONTEXT)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@torch.no_grad()
def _plainly(model, prompt, steps, sampling, seed):
    """What `generate` promises: the window restarts with its later half whenever it is full."""
    text, first = list(prompt), 0
    for _ in range(steps):
        if len(text) - first > CONTEXT:
            first = len(text) - CONTEXT // 2 - 1
        logits = model(torch.tensor([text[first:]]))[0][:, -1]
        text.append(sampling.choose(logits, [text], [seed]).item())
    return text[len(prompt) :]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.2, 0.9, 9, 0.95, 0.01)], ids=["greedy", "drawn"])
def test_as_without_a_cache(model, sampling):
    """Ragged prompts, more of them than rows, through a window that fills three times."""
    expected = [_plainly(model, prompt, 40, sampling, 5 + i) for i, prompt in enumerate(PROMPTS)]
    for batch in (1, 4, 6):
        outputs = generate(ModelEngine(model, batch), PROMPTS, 40, sampling, seed=5)
        assert [o.tokens for o in outputs] == expected, batch
        assert {o.finish for o in outputs} == {"length"}


def test_a_prompt_does_not_see_its_neighbours(model):
    engine, sampling = ModelEngine(model, 3), Sampling(temperature=1.5)
    together = generate(engine, PROMPTS, 10, sampling, seed=3)
    for i, prompt in enumerate(PROMPTS):
        alone = generate(ModelEngine(model, 1), [prompt], 10, sampling, seed=3 + i)
        assert alone[0].tokens == together[i].tokens
    assert together[0].tokens != generate(engine, PROMPTS, 10, sampling, seed=99)[0].tokens


def test_stop_tokens_and_rows_that_leave(model):
    """Texts of different lengths: rows move, and others take their places."""
    full = generate(ModelEngine(model, 1), PROMPTS, 12, Sampling(), seed=1)
    stops = {3, 8}
    stopped = generate(ModelEngine(model, 3), PROMPTS, 12, Sampling(), seed=1, stop_tokens=stops)
    lengths = set()
    for whole, cut in zip(full, stopped):
        end = next((i for i, token in enumerate(whole.tokens) if token in stops), None)
        assert cut.tokens == whole.tokens[:end] and cut.finish == ("length" if end is None else "stop")
        lengths.add(len(cut.tokens))
    assert len(lengths) > 2


def test_on_token_hears_and_ends(model):
    heard = []

    def on_token(i, token):
        heard.append((i, token))
        return i == 1 and len(heard) > 5

    outputs = generate(ModelEngine(model, 2), PROMPTS[:2], 8, GREEDY, on_token=on_token)
    for i in range(2):
        assert [token for number, token in heard if number == i] == outputs[i].tokens
    assert outputs[0].finish == "length" and outputs[1].finish == "stop" and len(outputs[1].tokens) == 3


def test_quantised_and_int8_cache(model):
    import copy

    rounded = copy.deepcopy(model)
    quantize_(rounded, Int8WeightOnly())
    engine = ModelEngine(rounded, 2, cache_dtype=torch.int8)
    assert engine.caches[0].k.dtype == torch.int8
    a, b = (generate(engine, PROMPTS[:3], 20, Sampling(), seed=2) for _ in range(2))
    assert [o.tokens for o in a] == [o.tokens for o in b]


def test_padded_vocabulary_is_cut(model):
    engine = ModelEngine(model, 1, vocab_size=5)
    tokens = generate(engine, [[1]], 50, Sampling(temperature=5.0))[0].tokens
    assert set(tokens) == set(range(5))


def test_refuses(model):
    engine = ModelEngine(model, 1, max_length=8)
    for prompts, match in (
        ([[]], "the prompt is empty, expected at least one token"),
        ([[1], list(range(9))], "prompt 2 of 2 has 9 tokens, expected at most 8, what the model can see"),
    ):
        with pytest.raises(UserError, match=match):
            generate(engine, prompts, 5)
    with pytest.raises(UserError, match="max_new_tokens is -1"):
        generate(engine, [[1]], -1)
    with pytest.raises(UserError, match="seed is -1"):
        generate(engine, [[1]], 1, seed=-1)
    with pytest.raises(UserError, match="a Linear cannot generate text"):
        ModelEngine(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="can see 1 tokens, expected at least 2"):
        ModelEngine(model, max_length=1)
    assert generate(engine, [[1]], 0)[0].finish == "length"


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("page_size", [None, 4])
def test_rows_of_a_cache(page_size, dtype):
    """A row filled through a view, moved, and read at its new place."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 6, 8)
    alone, cache = KVCache(1, 2, 12, 8, dtype), KVCache(3, 2, 12, 8, dtype, page_size=page_size)
    alone.append(k, v)
    cache.rows(2, 3).append(k, v)
    assert cache.lengths.tolist() == [0, 0, 6]
    cache.move_row(2, 0)
    assert cache.lengths.tolist() == [6, 0, 0]
    torch.testing.assert_close(cache.rows(0, 1).attend(q), alone.attend(q))
