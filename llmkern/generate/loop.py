"""The loop: prompts wait for a free row of the engine, and rows that are done make room at once."""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import UserError
from .engine import Engine
from .sampling import UNCHANGED, Sampling


@dataclass
class Output:
    """What was written after one prompt.

    Attributes:
        prompt: its tokens.
        tokens: the new ones; a stop token is not among them.
        finish: "stop" or "length"; None as long as it goes on.
    """

    prompt: list[int]
    seed: int
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None

    @property
    def text(self) -> list[int]:
        return self.prompt + self.tokens


def generate(
    engine: Engine,
    prompts: Sequence[Tensor | Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = UNCHANGED,
    *,
    seed: int = 0,
    stop_tokens: Collection[int] = (),
    on_token: Callable[[int, int], bool | None] | None = None,
) -> list[Output]:
    """Continue each prompt, as many at once as the engine has rows.

    Prompt i draws with seed + i and its own places alone, so what is written after it depends on no other
    prompt, nor on the number of rows.  When a row is full, the later half of its text is taken anew, and
    what came before is no longer seen.

    Args:
        engine: runs the model; rows that another call left are forgotten.
        prompts: token ids of each, of any lengths from 1 to the engine's max_length.
        max_new_tokens: the most to write after each.
        sampling: how tokens are chosen; by default from the model's distribution as it is.
        seed: not negative.
        stop_tokens: end a text, and are not part of it.
        on_token: called with a prompt's number and its new token as soon as there is one; True ends that
            text.

    Returns:
        An Output for each prompt.

    Raises:
        UserError: a prompt that is empty or too long, or a negative number.
    """
    _check(engine, prompts, max_new_tokens, seed)
    outputs = [Output([int(t) for t in prompt], seed + i) for i, prompt in enumerate(prompts)]
    if max_new_tokens == 0:
        return [_finished(output, "length") for output in outputs]
    numbers = {id(output): i for i, output in enumerate(outputs)}

    def accept(output: Output, token: int) -> None:
        if token in stop_tokens:
            output.finish = "stop"
            return
        output.tokens.append(token)
        if on_token is not None and on_token(numbers[id(output)], token):
            output.finish = "stop"
        elif len(output.tokens) == max_new_tokens:
            output.finish = "length"

    _Rows(engine, sampling, accept).run(deque(outputs))
    return outputs


class _Rows:
    """The sequences in the engine's rows.  A row has seen all of its text but the newest token."""

    def __init__(self, engine: Engine, sampling: Sampling, accept: Callable[[Output, int], None]) -> None:
        self.engine, self.sampling, self.accept = engine, sampling, accept
        self.running: list[Output] = []
        self.seen: list[int] = []  # tokens in each row

    def run(self, waiting: deque[Output]) -> None:
        while waiting or self.running:
            while waiting and len(self.running) < self.engine.batch:
                self._enter(waiting.popleft())
            if self.running:
                self._step()

    def _enter(self, output: Output) -> None:
        logits = self._fill(len(self.running), output.prompt)
        self.running.append(output)
        self.seen.append(len(output.prompt))
        self._choose([output], logits[None])

    def _step(self) -> None:
        for row, output in enumerate(self.running):
            if self.seen[row] == self.engine.max_length:
                kept = output.text[-(self.engine.max_length // 2) - 1 : -1]
                self._fill(row, kept)
                self.seen[row] = len(kept)
        newest = torch.tensor([output.tokens[-1] for output in self.running])
        logits = self.engine.step(newest)
        self.seen = [n + 1 for n in self.seen]
        self._choose(list(self.running), logits)

    def _fill(self, row: int, tokens: list[int]) -> Tensor:
        return self.engine.prefill(torch.tensor(tokens), row)

    def _choose(self, outputs: list[Output], logits: Tensor) -> None:
        """Give each of these outputs its next token; those that are done leave."""
        texts, seeds = [o.text for o in outputs], [o.seed for o in outputs]
        for output, token in zip(outputs, self.sampling.choose(logits, texts, seeds).tolist()):
            self.accept(output, token)
        for row in reversed(range(len(self.running))):
            if self.running[row].finish is not None:
                self._leave(row)

    def _leave(self, row: int) -> None:
        """The last row takes the place of this one."""
        last = len(self.running) - 1
        if row != last:
            self.engine.move(last, row)
            self.running[row], self.seen[row] = self.running[last], self.seen[last]
        self.running.pop()
        self.seen.pop()


def _finished(output: Output, reason: str) -> Output:
    output.finish = reason
    return output


def _check(engine: Engine, prompts: Sequence, max_new_tokens: int, seed: int) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("seed", seed)):
        if value < 0:
            raise UserError(f"{name} is {value}, expected 0 or more")
    for i, prompt in enumerate(prompts):
        which = "the prompt" if len(prompts) == 1 else f"prompt {i + 1} of {len(prompts)}"
        if len(prompt) == 0:
            raise UserError(f"{which} is empty, expected at least one token")
        if len(prompt) > engine.max_length:
            raise UserError(
                f"{which} has {len(prompt)} tokens, expected at most {engine.max_length}, what the model can "
                "see; shorten it"
            )
