"""`llmkern train` in which one process of the first start is killed: dying.py RANK MOMENT CALL train ...

MOMENT is "step" (before it), "part" (before its part of a checkpoint is written) or "name" (before a
checkpoint gets its name, which is when it begins to exist).
"""

import os
import signal
import sys

from llmkern import durable
from llmkern.cli import main
from llmkern.train import sharded
from llmkern.train.loop import Trainer


def die_in(owner, name: str, rank: int, call: int) -> None:
    """Kill this process, if it is that rank and was never restarted, at a call of `owner.name`."""
    real, count = getattr(owner, name), 0

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if first and count == call and int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, counted)


if __name__ == "__main__":
    rank, moment, call = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    owner, name = {"step": (Trainer, "advance"), "part": (sharded, "write"), "name": (durable, "rename")}[
        moment
    ]
    die_in(owner, name, rank, call)
    sys.exit(main(sys.argv[4:]))
