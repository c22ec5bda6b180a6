"""The adapter to the harness: what it tells is what the model says; with lm-eval where it is installed."""

import importlib
import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from llmkern import cli
from llmkern.models import GPT, GPTConfig
from llmkern.text import CharTokenizer
from llmkern.train import checkpoint

REAL = importlib.util.find_spec("lm_eval") is not None
LETTERS = "abcdefgh \n"


class FakeTemplateLM:
    """The parts of the library's base class that the adapter builds on."""

    def __init__(self):
        self.cache_hook = SimpleNamespace(add_partial=lambda *args: None)

    @property
    def prefix_token_id(self):
        return self.eot_token_id


@pytest.fixture
def harness(monkeypatch):
    if not REAL:
        for name in ("lm_eval", "lm_eval.api", "lm_eval.api.instance", "lm_eval.api.model", "lm_eval.tasks"):
            module = ModuleType(name)
            module.Instance = module.TaskManager = object
            module.TemplateLM = FakeTemplateLM
            monkeypatch.setitem(sys.modules, name, module)
    yield importlib.import_module("llmkern.evaluate.harness")
    if not REAL:
        del sys.modules["llmkern.evaluate.harness"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=10, block_size=12, n_layer=1, n_head=2, n_embd=16)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8)  # so that tokens differ in likelihood
    return model


def _log_p(model, tokens, first):
    """Of the tokens from `first` on, one at a time, and whether each is the likeliest."""
    total, greedy = 0.0, True
    for i in range(first, len(tokens)):
        with torch.no_grad():
            scores = model(torch.tensor(tokens[:i])[None])[0][0, -1].double().log_softmax(-1)
        total += scores[tokens[i]].item()
        greedy &= scores.argmax().item() == tokens[i]
    return total, greedy


def test_loglikelihood(harness, model):
    words = CharTokenizer(LETTERS)
    adapter = harness.HarnessModel(model, words, batch_size=2)
    pairs = [("abc", "de"), ("a", "bcdefgh"), ("hgfedcb", " a"), ("ab", "c")]
    best = model.generate(torch.tensor([words.encode_array("abc").tolist()]), 2, temperature=0)[
        0, 3:
    ].tolist()
    requests = [((c, t), adapter.tok_encode(c), adapter.tok_encode(t)) for c, t in pairs]
    requests.append((("abc", "?"), adapter.tok_encode("abc"), best))
    found = adapter._loglikelihood_tokens(requests)
    for (_, context, continuation), (log_p, greedy) in zip(requests, found):
        expected = _log_p(model, context + continuation, len(context))
        assert log_p == pytest.approx(expected[0], rel=1e-4) and greedy == expected[1]
    assert found[-1][1] and not all(greedy for _, greedy in found)


def test_what_is_too_long_loses_its_beginning(harness, model):
    adapter = harness.HarnessModel(model, CharTokenizer(LETTERS))
    context, continuation = adapter.tok_encode("abcdefgh" * 3), adapter.tok_encode("bad")
    ((log_p, _),) = adapter._loglikelihood_tokens([(("", ""), context, continuation)])
    tokens = (context + continuation)[-13:]
    with torch.no_grad():
        scores = model(torch.tensor(tokens[:-1])[None], torch.tensor(tokens[1:])[None])[0][0].log_softmax(-1)
    assert log_p == pytest.approx(sum(scores[9 + i, t].item() for i, t in enumerate(continuation)), rel=1e-4)


def test_rolling(harness, model):
    adapter = harness.HarnessModel(model, CharTokenizer(LETTERS))
    short, empty = adapter.loglikelihood_rolling(
        [SimpleNamespace(args=("abcab",)), SimpleNamespace(args=("",))]
    )
    tokens = [adapter.eot_token_id, *adapter.tok_encode("abcab")]
    assert short == pytest.approx(_log_p(model, tokens, 1)[0], rel=1e-4) and empty == 0


def test_generate_until(harness, model):
    adapter = harness.HarnessModel(model, CharTokenizer(LETTERS))
    requests = [SimpleNamespace(args=("abcdefgh" * 3, {"max_gen_toks": 5, "until": []}))]
    (text,) = adapter.generate_until(requests)
    prompt = torch.tensor([adapter.tok_encode("bcdefgh")])
    assert text == adapter.words.decode(model.generate(prompt, 5, temperature=0)[0, 7:])
    requests[0].args[1]["until"] = text[2]
    assert adapter.generate_until(requests) == [text[: text.index(text[2])]]


@pytest.mark.skipif(not REAL, reason="needs lm-eval")
def test_a_task_from_the_command(model, tmp_path, capsys):
    checkpoint.save(tmp_path / "run", 0, model, CharTokenizer(LETTERS))
    rows = [{"question": "abc", "choices": ["d", "h"], "answer": i % 2} for i in range(6)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "letters.yaml").write_text(
        "task: letters\ndataset_path: json\noutput_type: multiple_choice\ntest_split: train\n"
        f"dataset_kwargs:\n  data_files: {tmp_path / 'rows.json'}\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'
        'target_delimiter: ""\nmetric_list:\n  - metric: acc\n'
    )
    argv = ["evaluate", str(tmp_path / "run"), "--include-path", str(tmp_path), "--out", str(tmp_path)]
    assert cli.main([*argv, "--tasks", "letters"]) == 0
    assert "letters" in capsys.readouterr().out
    assert json.loads((tmp_path / "evaluation.json").read_text())["tasks"]["letters"]["acc,none"] == 0.5
    assert cli.main([*argv, "--tasks", "leters"]) == 2
    assert "task 'leters' is unknown; did you mean 'letters'?" in capsys.readouterr().err


def test_one_of_data_and_tasks(capsys):
    for argv in (["evaluate", "x"], ["evaluate", "x", "y", "--tasks", "z"]):
        assert cli.main(argv) == 2
        assert "expected DATA" in capsys.readouterr().err
