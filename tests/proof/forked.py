"""Runs pytest in forks of a process that has the large packages loaded already: a run takes a second or two.

Started as a script, in the folder of the project under test.  Each line it reads is a JSON list, (arguments
of pytest, seconds at most, file for the output); each line it writes is the exit code, or null for a run
that was stopped; the first line says that it is ready.
"""

import json
import os
import signal
import sys
import time
from contextlib import suppress


def main() -> None:
    sys.path.pop(0)  # the folder of this file: the project is found by PYTHONPATH
    os.environ["TRITON_INTERPRET"] = "1"  # as tests/conftest.py has it
    import hypothesis  # noqa: F401
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch  # noqa: F401
    import triton  # noqa: F401

    with suppress(ImportError):
        import transformers.generation
        import transformers.modeling_utils  # noqa: F401

    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(_run(*json.loads(line))), flush=True)


def _run(arguments: list[str], limit: float, log: str) -> int | None:
    child = os.fork()
    if not child:
        _test(arguments, log)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _test(arguments: list[str], log: str) -> None:
    """Never returns."""
    import pytest

    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 3  # an internal error
    try:
        code = int(pytest.main(arguments))
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
