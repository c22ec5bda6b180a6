"""What a training shows while it runs: one line that changes on a terminal, some lines elsewhere."""

from collections import deque
from statistics import median

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from .loop import Record

LINES = 10  # of progress where there is no terminal


class Pace:
    """Tokens per second, from the median of the last steps."""

    def __init__(self, steps: int = 20) -> None:
        self.recent: deque[float] = deque(maxlen=steps)

    def __call__(self, record: Record) -> float:
        self.recent.append(record.tokens / record.seconds)
        return median(self.recent)


class Live:
    """A `Log` that shows loss, tokens/s, MFU and the time that is left; use it as a context.

    Args:
        console: where to.
        steps: of the whole training.
        start: steps done before.
        token_flops: model FLOPs of a token, forward and backward.
        peak: FLOP/s of the device at best; MFU is what the model's own FLOPs use of it (Chowdhery et al.
            2022, PaLM, arXiv:2204.02311, app. B; attention counted whole, not half for causal).
    """

    def __init__(self, console: Console, steps: int, start: int, token_flops: float, peak: float) -> None:
        self.console, self.steps, self.start = console, steps, start
        self.per_token = token_flops / peak
        self.pace, self.validated, self.spent = Pace(), "", 0.0
        self.every = max(1, (steps - start) // LINES)
        columns = (
            MofNCompleteColumn(),
            BarColumn(12),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("", total=steps, completed=start)

    def __enter__(self) -> "Live":
        self.bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.__exit__(*error)

    def record(self, record: Record) -> None:
        rate = self.pace(record)
        self.spent += record.seconds
        if self.console.is_terminal:
            self.bar.update(self.task, advance=1, description=self._line(record, rate))
            return
        done = record.step + 1
        if done % self.every == 0 or done == self.steps:
            left = self.spent / (done - self.start) * (self.steps - done)
            line = f"step {done:>5}/{self.steps}, {left:,.0f} s left: {self._line(record, rate)}"
            self.console.print(line, soft_wrap=True)

    def _line(self, record: Record, rate: float) -> str:
        return (
            f"loss {record.loss:.4f}{self.validated}, {rate:,.0f} tokens/s, MFU {rate * self.per_token:.1%}"
        )

    def validation(self, step: int, loss: float) -> None:
        self.validated = f", val {loss:.4f}"

    def flush(self) -> None:
        """Everything is shown at once."""

    def close(self) -> None:
        """The context ends it."""


def token_flops(model: nn.Module, length: int) -> float:
    """Model FLOPs of one token, forward and backward: 6 N + 12 L C T (PaLM, app. B).

    N counts what is multiplied with: the matrices of all linears, the tied head too.

    Args:
        model: one of ours.
        length: T, tokens in a window.
    """
    n = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    n += sum(m.in_proj_weight.numel() for m in model.modules() if isinstance(m, nn.MultiheadAttention))
    c = model.config
    layers, width = (c.n_layer, c.n_embd) if hasattr(c, "n_layer") else (c.num_hidden_layers, c.hidden_size)
    return 6 * n + 12 * layers * width * length
