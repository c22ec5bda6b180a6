"""`llmkern train` under torchrun, small; whatever happens, no process is left behind."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

SIZES = "--n-layer 2 --n-head 2 --n-embd 16 --block-size 8 --batch-size 4 --warmup-steps 2 --plot false"
TIMES = "--save-every 2 --eval-every 2 --eval-batches 2"
DYING = Path(__file__).parent / "dying.py"


def train(data: Path, out: Path, *keys: str) -> list[str]:
    """The arguments of `llmkern`."""
    return ["train", "--data", str(data), "--out", str(out), *SIZES.split(), *TIMES.split(), *keys]


def torchrun(processes: int, program: list[str], *options: str, timeout: float = 400) -> tuple[int, str]:
    """(exit code, all output)."""
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    return run([*command, *options, *program], timeout)


def single(arguments: list[str]) -> tuple[int, str]:
    return run(["-m", "llmkern", *arguments], 200)


def run(arguments: list[str], timeout: float) -> tuple[int, str]:
    """Python with these arguments, in a session of its own, which ends with it or after `timeout` seconds."""
    process = subprocess.Popen(
        [sys.executable, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        said = process.communicate(timeout=timeout)[0]
        return process.returncode, said
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"not done after {timeout} s: {(error.stdout or b'').decode()}") from None
    finally:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    """Kill it if it runs, and its children: torchrun gives each worker a session of its own."""
    if process.poll() is None:
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in [process.pid, *map(int, workers)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()
