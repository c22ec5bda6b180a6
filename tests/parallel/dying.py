"""`llmkern train` in which one process comes to an end: dying.py RANK MOMENT CALL train ...

MOMENT is "step" (before it), "part" (before its part of a checkpoint is written) or "name" (before a
checkpoint gets its name, which is when it begins to exist): there it is killed, in the first start.  At
"hang" it stops to answer before step CALL, in every start; at "late" it is slow to look for files of others.
"""

import os
import signal
import sys
import time

from llmkern import durable
from llmkern.cli import main
from llmkern.train import sharded
from llmkern.train.loop import Trainer
from llmkern.train.team import Team

PLACES = {
    "step": (Trainer, "advance"),
    "part": (sharded, "write"),
    "name": (durable, "rename"),
    "hang": (Trainer, "advance"),
    "late": (Team, "lost"),
}


def die() -> None:
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(1000)


def wait() -> None:
    time.sleep(2)


ENDS = {"hang": hang, "late": wait}


def end_in(moment: str, call: int) -> None:
    """Before that call of what the moment names, come to an end."""
    owner, name = PLACES[moment]
    real, count = getattr(owner, name), 0

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        if count == call:
            ENDS.get(moment, die)()
        return real(*args, **kwargs)

    setattr(owner, name, counted)


if __name__ == "__main__":
    rank, moment, call = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    if int(os.environ["RANK"]) == rank:
        end_in(moment, call)
    sys.exit(main(sys.argv[4:]))
