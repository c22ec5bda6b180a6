"""python -m benchmarks.gpu: on a GPU machine, the tests on the GPU and all benchmarks, in 8 minutes."""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from llmkern import machine

TEST_SECONDS = 190
BENCHMARK_MINUTES = 3.5  # no case starts later
BENCHMARK_SECONDS = 270  # and none runs longer


def main(argv: Sequence[str] | None = None) -> int:
    """Run both parts; 0 if both succeeded, 1 if not, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--tests", default="gpu", metavar="EXPRESSION", help="pytest -m; default: gpu")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(
            "torch sees no GPU here; run this on a machine with one and a torch built for it", file=sys.stderr
        )
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"{machine.slug(torch.cuda.get_device_name())}-{machine.describe('cuda')['date']}"
    tests = ["pytest", "-q", "--no-header", "--tb=short", "-m", args.tests]
    benchmarks = [
        "benchmarks", "--device", "cuda", "--dtype", "bfloat16,float32", "--plot",
        "--minutes", str(BENCHMARK_MINUTES), "--out", str(args.out),
    ]  # fmt: skip
    passed = run(tests, TEST_SECONDS, args.out / f"{name}-tests.txt")
    measured = run(benchmarks, BENCHMARK_SECONDS, args.out / f"{name}-benchmarks.txt")
    return int(not (passed and measured))


def run(module: list[str], seconds: float, log: Path) -> bool:
    """`python -m` these words within a time box; print the end of its output and keep all in `log`."""
    print(f"python -m {' '.join(module)}  (at most {seconds:g} s)", flush=True)
    with log.open("w") as file:
        try:
            command = [sys.executable, "-m", *module]
            code = subprocess.run(
                command, cwd=machine.ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            file.write(f"\nstopped after {seconds:g} s\n")
            code = -1
    print("\n".join(log.read_text(errors="replace").splitlines()[-80:]), flush=True)
    print(f"{'done' if code == 0 else 'FAILED'}, log in {log}", flush=True)
    return code == 0


if __name__ == "__main__":
    sys.exit(main())
