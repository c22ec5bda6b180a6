"""Our models in EleutherAI's Language Model Evaluation Harness (Gao et al. 2021, doi:10.5281/zenodo.5371628).

Needs lm-eval: `pip install llmkern[eval]`.

    results = lm_eval.simple_evaluate(HarnessModel(*llmkern.load.load("runs/docs")), tasks=["hellaswag"])
"""

import difflib
from collections.abc import Sequence
from typing import Any

import lm_eval
import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from torch import Tensor, nn

from ..errors import UserError
from ..generate import ModelEngine, Sampling, complete
from ..generate.text import encode_prompt
from ..text import Tokenizer
from .language import predictability

NEW_TOKENS = 256  # that a task gets if it does not say how many, as in the harness's own models


class HarnessModel(TemplateLM):
    """A causal model as the harness wants it.

    Args:
        model: of ours, in `eval` mode.
        tokenizer: the model's.
        batch_size: sequences at once.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, batch_size: int = 8) -> None:
        super().__init__()
        self.model, self.words, self.batch_size = model, tokenizer, batch_size
        self.context = model.config.block_size
        self._device = next(model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        """What stands before a text: the token between texts, or a line break where there is none."""
        return encode_prompt(self.words, "")[-1].item()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.words.encode_array(string).tolist()

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(sum of log p, whether each token is the likeliest) of every continuation after its context."""
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: len(requests[i][1]) + len(requests[i][2]))
        for start in range(0, len(order), self.batch_size):
            some = order[start : start + self.batch_size]
            pairs = [(requests[i][1], requests[i][2]) for i in some]
            for i, result in zip(some, self._score(pairs)):
                results[i] = result
                self.cache_hook.add_partial("loglikelihood", requests[i][0], result)
        return results

    @torch.inference_mode()
    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """As above, in one batch; what is too long for the model loses its beginning."""
        texts = [(context + continuation)[-self.context - 1 :] for context, continuation in pairs]
        inputs = torch.zeros(len(texts), max(map(len, texts)) - 1, dtype=torch.int64)
        for row, text in zip(inputs, texts):
            row[: len(text) - 1] = torch.tensor(text[:-1])  # what follows a text has no say in it
        hidden = self.model.hidden(inputs.to(self._device))
        results = []
        for row, text, (_, continuation) in zip(hidden, texts, pairs):
            count = min(len(continuation), len(text) - 1)
            results.append(
                self._score_one(row[len(text) - 1 - count : len(text) - 1], text[len(text) - count :])
            )
        return results

    def _score_one(self, hidden: Tensor, targets: list[int]) -> tuple[float, bool]:
        logits = self.model.lm_head(hidden).float()  # (T, V)
        wanted = torch.tensor(targets, device=logits.device)
        nats = F.cross_entropy(logits, wanted, reduction="none").double().sum()
        return -nats.item(), bool((logits.argmax(-1) == wanted).all())

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each token seen once, after the token between texts."""
        results = []
        for request in requests:
            tokens = torch.tensor([self.prefix_token_id, *self.tok_encode(request.args[0])])
            nats = (
                predictability(self.model, tokens, batch_size=self.batch_size).nats
                if len(tokens) > 1
                else 0.0
            )
            results.append(-nats)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, -nats)
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, greedily unless the task samples."""
        results = []
        for request in requests:
            context, options = request.args
            text = self._write(context, dict(options))
            results.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return results

    def _write(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        new = min(int(options.get("max_gen_toks", NEW_TOKENS)), self.context - 1)
        prompt = encode_prompt(self.words, context)
        room = self.context - new
        if len(prompt) > room:
            context = self.words.decode(prompt[-room:])
        temperature = float(options.get("temperature", 1.0)) if options.get("do_sample") else 0.0
        sampling = Sampling(
            temperature=temperature,
            top_p=float(options.get("top_p", 1.0)),
            top_k=int(options.get("top_k", 0)),
        )
        engine = ModelEngine(self.model, vocab_size=len(self.words))
        stop = [until] if isinstance(until, str) else list(until)
        return complete(engine, self.words, [context], new, sampling, stop=stop)[0].text


def measure_tasks(
    model: HarnessModel,
    tasks: Sequence[str],
    limit: int | None = None,
    few_shot: int | None = None,
    include_path: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Run tasks of the harness.

    Args:
        model: to measure.
        tasks: names, as `lm_eval ls tasks` lists them.
        limit: of examples of each task; None is all.
        few_shot: examples before each question; None is what the task says.
        include_path: folder with the YAML files of more tasks.

    Returns:
        Task -> measure -> value, as the harness has them.

    Raises:
        UserError: an unknown task, or one whose data cannot be had.
    """
    manager = TaskManager(include_path=include_path)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, 1)
        hint = f"did you mean {near[0]!r}?" if near else "`lm_eval ls tasks` lists those that are known"
        raise UserError(f"task {unknown[0]!r} is unknown; {hint}")
    try:
        found = lm_eval.simple_evaluate(
            model, tasks=list(tasks), num_fewshot=few_shot, limit=limit, log_samples=False,
            bootstrap_iters=1000, task_manager=manager,
        )  # fmt: skip
    except OSError as error:  # also of the library that fetches the data
        raise UserError(
            f"the data of {', '.join(tasks)} cannot be had ({error}); is there a network?"
        ) from None
    return {task: {k: v for k, v in of.items() if k != "alias"} for task, of in found["results"].items()}
