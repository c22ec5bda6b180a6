"""Signals: the first asks the run to save and stop, the second stops it at once."""

import os
import signal
import threading
from types import FrameType


class StopSignal:
    """Inside the `with` block, SIGTERM and SIGINT are remembered in `number`; a second one ends the process.

    Outside of the main thread, where Python takes no handlers, it remembers nothing.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def __enter__(self) -> "StopSignal":
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.number = number
