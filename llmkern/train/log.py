"""What a run writes while it trains: log.jsonl, and TensorBoard events.

A line of log.jsonl is a step {"step", "loss", "grad_norm", "learning_rate", "tokens", "seconds"} or a
validation {"step", "val_loss"} of the weights before that step; the last one has the number of all steps.
"""

import json
import math
from pathlib import Path
from typing import Any, Protocol

from .. import durable
from ..errors import UserError
from .loop import Record

FILE_NAME = "log.jsonl"


class Log(Protocol):
    """Whoever wants to hear of a run."""

    def record(self, record: Record) -> None: ...
    def validation(self, step: int, loss: float) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class JsonLog:
    """Appends to log.jsonl; what an earlier process wrote of steps from `step` on is taken back.

    Args:
        run: the folder of the run.
        step: the step at which this process begins.
        every: steps between two lines.
    """

    def __init__(self, run: Path, step: int, every: int) -> None:
        self.path, self.every = run / FILE_NAME, every
        kept = [json.dumps(line) + "\n" for line in read_log(run) if line["step"] < step]
        durable.write_file(self.path, "".join(kept).encode())
        self.file = self.path.open("a", encoding="utf-8")

    def record(self, record: Record) -> None:
        if record.step % self.every == 0:
            self._write(record._asdict())

    def validation(self, step: int, loss: float) -> None:
        self._write({"step": step, "val_loss": loss})
        self.flush()

    def _write(self, fields: dict[str, Any]) -> None:
        plain = {k: v if math.isfinite(v) else None for k, v in fields.items()}  # JSON knows no NaN
        self.file.write(json.dumps(plain) + "\n")

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; a last one that a killed process left half is dropped."""
    path = run / FILE_NAME
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    result = []
    for number, line in enumerate(lines, 1):
        try:
            fields = json.loads(line)
            fields["step"] + 0
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise UserError(
                f"{str(path)!r} has no log in line {number}; move it away and start again"
            ) from None
        result.append(fields)
    return result


class TensorBoardLog:
    """Writes TensorBoard events into the run's folder; those of steps from `step` on are replaced."""

    def __init__(self, run: Path, step: int, every: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "tensorboard is true, but the library is missing; `pip install llmkern[tensorboard]`"
            ) from None
        self.every, self.writer = every, SummaryWriter(run / "tensorboard", purge_step=step)

    def record(self, record: Record) -> None:
        if record.step % self.every == 0:
            self.writer.add_scalar("loss/train", record.loss, record.step)
            self.writer.add_scalar("grad_norm", record.grad_norm, record.step)
            self.writer.add_scalar("learning_rate", record.learning_rate, record.step)
            self.writer.add_scalar("tokens_per_second", record.tokens / record.seconds, record.step)

    def validation(self, step: int, loss: float) -> None:
        self.writer.add_scalar("loss/val", loss, step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
