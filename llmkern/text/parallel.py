"""Work on a stream in several processes, in order and with a bounded number of pieces in memory."""

import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def parallel_map(function: Callable[[T], R], items: Iterable[T], workers: int = 0) -> Iterator[R]:
    """`map(function, items)`, in processes if there are two items or more.

    Args:
        function: can be pickled; uses no threads of torch.
        items: read as far as is needed to keep the workers busy.
        workers: processes; 0 is one for each core, 1 works in this process.
    """
    workers = workers or os.cpu_count() or 1
    items = iter(items)
    first = list(islice(items, 2))
    if workers == 1 or len(first) < 2:
        yield from map(function, chain(first, items))
        return
    # a forked worker starts at once; elsewhere fork is missing or unsafe
    method = "fork" if sys.platform == "linux" else "spawn"
    with ProcessPoolExecutor(workers, multiprocessing.get_context(method)) as pool:
        waiting = deque()
        for item in chain(first, items):
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
