"""What a process says when an exchange does not end: which one, at which step, and who was not heard of."""

import time
from types import TracebackType

from torch.distributed import Store

PATIENCE = 5.0  # seconds in which others say that they wait, too

# functions on the stack of an error -> what was exchanged; the innermost counts
OPS = {
    "all_reduce": "all_reduce",
    "total": "all_reduce",
    "sum_replicated": "all_reduce",
    "all_gather": "all_gather",
    "all_gather_object": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "foreach_all_gather": "all_gather",
    "foreach_all_gather_copy_out": "all_gather",
    "gather": "all_gather",
    "scatter": "reduce_scatter",
    "foreach_reduce": "reduce_scatter",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "broadcast": "broadcast",
    "barrier": "barrier",
    "batch_isend_irecv": "send and recv",
    "_wait_batch_p2p": "send and recv",
    "_pipelined": "send and recv between stages",
    "gather_object": "gather",
    "scatter_object_list": "scatter",
    "backward": "all_reduce of gradients",
}


def exchange_of(error: BaseException) -> str | None:
    """What was exchanged when the error came, or None if nothing was."""
    text = str(error).lower()
    if not any(word in text for word in ("gloo", "nccl", "timed out", "connection")):
        return None
    names, trace = [], error.__traceback__
    while isinstance(trace, TracebackType):
        names.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    return next((OPS[name] for name in reversed(names) if name in OPS), "exchange")


def explain(error: BaseException, store: Store, rank: int, world: int, step: int) -> str | None:
    """One sentence about a failed exchange; None if the error is of another kind.

    Every process that waits says so in the store; who has not after a while hangs, or is gone.
    """
    if (op := exchange_of(error)) is None:
        return None
    why = str(error).strip().splitlines()[0]
    silent = _silent(store, rank, world, op)
    who = f"nothing was heard of rank {', '.join(map(str, silent))}" if silent else "all ranks still answer"
    return f"rank {rank} of {world}: {op} in step {step} did not end, {who}; see its log ({why})"


def _silent(store: Store, rank: int, world: int, op: str) -> list[int]:
    """The ranks that do not say that they wait, as far as the store can be reached."""
    others = [other for other in range(world) if other != rank]
    try:
        store.set(f"waits/{rank}", op)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and not store.check([f"waits/{other}" for other in others]):
            time.sleep(0.2)
        return [other for other in others if not store.check([f"waits/{other}"])]
    except RuntimeError:  # it was on the machine that cannot be reached
        return others
