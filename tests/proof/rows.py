"""The parts of the proof: what each finds, against its figure, with a control that must turn it red."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from llmkern.errors import UserError
from llmkern.ops import OPS
from llmkern.text import corpus
from proof import determinism, fuzz, malformed, mutants, sanitizers, training
from proof.copies import ROOT

CASES, WITH_GRADIENT, INTERPRETED = 5000, 1000, 100
RUNS, MALFORMED = 30, 50_000
SEEDS, STEPS = (0, 1, 2), 300
SHOWN = 60  # items of a list
PROCESSES = os.cpu_count() or 1
COMPILE = [sys.executable, "-m", "benchmarks.aot", "--failed", "--once", "--all", "--dtype", "bfloat16"]


class Row(NamedTuple):
    """One line of the page.

    Attributes:
        what: is shown.
        figure: what was asked.
        found: what came out.
        good: whether it is as asked, and the control was seen.
        control: the planted failure.
        command: that makes the row again.
        details: a table or list for below, Markdown.
    """

    what: str
    figure: str
    found: str
    good: bool
    control: str
    command: str
    details: str = ""


def cases() -> Iterator[Row]:
    """Random calls on the C++ kernels, and their pooled errors."""
    tallies = fuzz.fuzz_all(CASES, WITH_GRADIENT)
    bad = [what for tally in tallies.values() for what in tally.bad]
    seen = all(any(fuzz.planted(op, seed) for seed in range(3)) for op in OPS.values())
    least = min(t.forward for t in tallies.values())
    backward = min(t.backward for t in tallies.values() if OPS[t.op].gradients)
    yield Row(
        "random calls of each op on the C++ kernels: shapes, strides, offsets, dtypes, scales, options",
        f"≥ {CASES:,} forward, ≥ {WITH_GRADIENT:,} backward; 0 beyond the error rule",
        f"{least:,} forward, {backward:,} backward of each of {len(tallies)} ops; {len(bad)} beyond it",
        not bad and seen and least >= CASES and backward >= WITH_GRADIENT,
        "an error of 1/1000 of the largest output, in every op", "python tests/proof cases",
        _list(bad),
    )  # fmt: skip
    yield _pooled(tallies)


def _pooled(tallies: dict[str, fuzz.Tally]) -> Row:
    lines, misses = ["| op | dtype | of | error / torch's | bias, u | torch's bias, u | calls | cancelling |",
                     "|---|---|---|---|---|---|---|---|"], []  # fmt: skip
    for name, tally in tallies.items():
        for (dtype, kind), pool in sorted(tally.pools.items()):
            if not pool.cases:
                continue
            theirs = pool.signed_torch / max(1, pool.cases)
            lines.append(
                f"| {name} | {dtype} | {kind} | {pool.ratio:.3f} | {pool.bias:+.3f} | {theirs:+.3f} "
                f"| {pool.cases} | {pool.cancelling} |"
            )
            most = fuzz.POOLED_FORWARD if kind == "outputs" else fuzz.POOLED_BACKWARD
            if pool.ratio > most:
                misses.append(f"{name} {dtype} {kind}: {pool.ratio:.3f}")
            if abs(pool.bias) > fuzz.POOLED_BIAS + abs(theirs):
                misses.append(f"{name} {dtype} {kind}: bias {pool.bias:+.3f} u, torch's {theirs:+.3f}")
    missed = f"; beyond it: {'; '.join(misses)}" if misses else ""
    return Row(
        "pooled error against float64, relative to torch's in the same dtype",
        f"≤ {fuzz.POOLED_FORWARD} forward, ≤ {fuzz.POOLED_BACKWARD} backward, bias ≤ {fuzz.POOLED_BIAS} u "
        "beyond torch's own",
        f"{len(lines) - 2} pools, {len(lines) - 2 - len(misses)} within{missed}",
        not misses, "float32 cut toward zero (tests/test_proof.py)", "python tests/proof cases",
        "\n".join(lines),
    )  # fmt: skip


def interpreted() -> Iterator[Row]:
    """The same on Triton's kernels, interpreted and fenced."""
    tallies = fuzz.fuzz_all(INTERPRETED, INTERPRETED, "triton", fenced=True)
    bad = [what for tally in tallies.values() for what in tally.bad]
    least = min(t.forward for t in tallies.values())
    passed, last = run_tests("tests/test_interpreter.py", "tests/test_proof.py", "-k", "seen or overflow")
    yield Row(
        "the same through Triton's interpreter: bfloat16 as on a GPU, guard pages, NaN between elements, "
        "int32 overflow",
        f"≥ {INTERPRETED} forward and backward of each op; 0 beyond the rule",
        f"{least} of each of {len(tallies)} ops; {len(bad)} beyond it",
        not bad and passed and least >= INTERPRETED,
        f"a read one byte outside, an overflow, an error: {last}", "python tests/proof interpreted",
        _list(bad),
    )  # fmt: skip


def seeded() -> Iterator[Row]:
    """Mutants."""
    verdicts = list(mutants.judge_all(mutants.mutants()))
    families = sorted({v.mutant.family for v in verdicts})
    survivors = [f"{v.mutant.file}: `{v.mutant.new.strip()}` ({v.why})" for v in verdicts if not v.killed]
    count = {f: [v for v in verdicts if v.mutant.family == f] for f in families}
    table = ["| family | seeded | killed | median seconds | longest |", "|---|---|---|---|---|"]
    for family, vs in count.items():
        seconds = sorted(v.seconds for v in vs)
        table.append(
            f"| {family} | {len(vs)} | {sum(v.killed for v in vs)} | {seconds[len(vs) // 2]:.1f} "
            f"| {seconds[-1]:.1f} |"
        )
    slow = max(v.seconds for v in verdicts)
    enough = len(verdicts) >= 150 and min(map(len, count.values())) >= 20
    yield Row(
        "seeded bugs: one line broken in a kernel, an op, the trainer, checkpoints or swap_",
        "≥ 20 a family, ≥ 150 in all, all killed, ≤ 10 s each",
        f"{len(verdicts)} in {len(families)} families, {len(verdicts) - len(survivors)} killed; "
        f"longest {slow:.1f} s",
        enough and not survivors and slow <= 10,
        "a comment, which no test may kill (tests/test_proof.py)", "python tests/proof seeded",
        "\n".join(table) + "\n\n" + _list(survivors),
    )  # fmt: skip


def deterministic() -> Iterator[Row]:
    """Equal bits."""
    rows = determinism.table(RUNS, cases=8)
    words = {True: "supported", False: "not supported", None: "no question"}
    varies = {name: op.varies for name, op in OPS.items() if op.varies}
    table = ["| op | from run to run | 1, 2 or 4 threads | alone as in a batch |", "|---|---|---|---|"]
    for r in rows:
        batch = f"not promised: {varies[r.op]}" if r.op in varies else words[r.batch]
        table.append(f"| {r.op} | {words[r.runs]} | {words[r.threads]} | {batch} |")
    promised = [r for r in rows if r.batch is not None and r.op not in varies]
    yield Row(
        "determinism of the C++ kernels, forward and backward; batch invariance of the ops of inference that "
        "promise it",
        f"bit-equal: {RUNS} runs x 1, 2, 4 threads, every op; alone as in a batch, each op that promises it",
        f"{sum(r.runs and r.threads for r in rows)} of {len(rows)} ops; batch: "
        f"{sum(r.batch for r in promised)} of {len(promised)}"
        + "".join(f"; {name} promises none, since {why}" for name, why in varies.items()),
        all(r.good for r in rows), "one bit (tests/test_proof.py)", "python tests/proof deterministic",
        "\n".join(table),
    )  # fmt: skip


def files() -> Iterator[Row]:
    """Malformed files."""
    tallies = malformed.try_all(-(-MALFORMED // len(malformed.KINDS)))
    bad = [what for tally in tallies for what in tally.bad]
    table = [
        "| kind | tried | refused in a sentence | read, its meaning changed or not |",
        "|---|---|---|---|",
    ]
    table += [f"| {t.kind} | {t.tried:,} | {t.refused:,} | {t.tried - t.refused:,} |" for t in tallies]
    yield Row(
        "harmed files: checkpoints, prepared data, safetensors, GGUF, tokenizers, tables, configs",
        f"≥ {MALFORMED:,}; no foreign exception, nothing sealed accepted, no memory beyond "
        f"{malformed.MEMORY >> 20} MiB of addresses",
        f"{sum(t.tried for t in tallies):,} tried, {len(bad)} otherwise", not bad,
        "a reader that lets an exception out (tests/test_proof.py)", "python tests/proof files",
        "\n".join(table) + "\n\n" + _list(bad),
    )  # fmt: skip


def sanitized() -> Iterator[Row]:
    """The tests of the ops on the C++ kernels, under each of the compiler's tools, side by side."""
    with ThreadPoolExecutor() as pool:
        for tool, found in zip(sanitizers.TOOLS, pool.map(sanitizers.sanitize, sanitizers.TOOLS)):
            passed = re.fullmatch(r"\d+ passed.*", found.tests) and "failed" not in found.tests
            yield Row(
                f"the C++ kernels under {tool.name}",
                "0 reports", f"{len(found.reports)} reports; {found.tests}",
                bool(passed) and not found.reports and found.planted,
                f"{tool.fault}: {'reported' if found.planted else 'NOT reported'}",
                "python tests/proof sanitized", _list(found.reports),
            )  # fmt: skip


def trained() -> Iterator[Row]:
    """Whole trainings."""
    what = (
        f"{STEPS} steps of a GPT of 4 layers x 128 on Shakespeare, swapped against plain PyTorch in float32"
    )
    figure = (
        f"{len(SEEDS)} seeds: losses within {training.LARGEST:.0e} to step {training.EARLY}, the last within "
        f"{training.FINAL:.0%}"
    )
    command = "python tests/proof trained"
    try:
        text = corpus.load("shakespeare").text
    except UserError as error:
        yield Row(what, figure, f"not run: {error}", False, "none", command)
        return
    pairs, control = training.train_all(text, SEEDS, STEPS)
    table = [
        "| seed | largest difference to step 50 | plain | swapped | final difference |",
        "|---|---|---|---|---|",
    ]
    table += [
        f"| {p.seed} | {p.early:.1e} | {p.plain.last:.4f} | {p.swapped.last:.4f} | {p.final:+.2%} |"
        for p in pairs
    ]
    yield Row(
        what, figure,
        f"within {max(p.early for p in pairs):.1e}, and {max(abs(p.final) for p in pairs):.2%}",
        all(p.good for p in pairs) and control.early > training.LARGEST,
        f"one weight of 8,320 changed by 1: {control.early:.1e}", command, "\n".join(table),
    )  # fmt: skip


def binaries() -> Iterator[Row]:
    """Triton's kernels compiled for GPUs that are not here."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(COMPILE, cwd=ROOT, env=environment, capture_output=True, text=True)
    *problems, last = done.stdout.strip().splitlines() or ["no output"]
    found = re.match(r"(\d+) kernels compiled for (.*): (\d+) with a problem", last)
    count, targets = (int(found[1]), len(found[2].split(", "))) if found else (0, 0)
    passed, planted = run_tests("tests/test_aot.py", "-k", "planted")
    yield Row(
        "Triton's kernels compiled for GPUs, in their default configurations",
        "≥ 200 binaries for ≥ 9 targets: 0 spills, tensor cores used, no hidden TF32, no more registers, "
        "shared memory or instructions than benchmarks/results/aot.csv says",
        last, done.returncode == 0 and passed and count >= 200 and targets >= 9,
        f"spills, growth, atomics and narrow accesses: {planted}", " ".join(["python", *COMPILE[1:]]),
        _list(problems),
    )  # fmt: skip


def tested(
    what: str, figure: str, control: str, *arguments: str, processes: int = PROCESSES, **environment: str
) -> Callable[[], Iterator[Row]]:
    """A part that is a selection of tests."""

    def part() -> Iterator[Row]:
        passed, last = run_tests(*arguments, processes=processes, **environment)
        command = "pytest " + " ".join(f"'{a}'" if " " in a else a for a in arguments)
        yield Row(what, figure, last, passed, control, command)

    return part


def run_tests(*arguments: str, processes: int = PROCESSES, **environment: str) -> tuple[bool, str]:
    """Whether these tests pass, and pytest's last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(processes), "--dist", "worksteal", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or ["no output"]
    return done.returncode == 0, re.sub(r"=+ ?| in [\d.]+s.*", "", lines[-1])


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "cases": cases,
    "interpreted": interpreted,
    "seeded": seeded,
    "historical": tested(
        "bugs that other projects shipped, 38 of them, as tests", "all", "each fails with the bug put back",
        "tests/history",
    ),
    "nasty": tested(
        "25 classes of nasty inputs x every op, as docs/numerics.md states them",
        "a stated result or a stated error",
        "errors are matched word by word; seeded bugs", "tests/ops/test_nasty.py",
        "tests/ops/test_nasty_table.py", "tests/ops/test_bad_input.py",
    ),
    "far": tested(
        "tensors of more than 2³¹ elements, and strides that lead beyond",
        "each kernel that takes strides, C++ and Triton; each C++ kernel that takes rows; 2²⁰ tokens",
        "an index of 32 bits (seeded bug)",
        "tests/ops/test_far.py", "-m", "slow or not slow", processes=1,
        THP_MEM_ALLOC_ENABLE="1",  # torch asks for large pages, of which the system clears more in a second
    ),
    "sanitized": sanitized,
    "deterministic": deterministic,
    "contracts": tested(
        "opcheck, gradcheck, double backward, inputs unchanged bit for bit, torch.compile equal to eager",
        "every op", "test_a_planted_... of these tests", "tests/ops/test_contract.py",
        "tests/ops/test_numbers.py",
        "-k", "not generic and not avx2 and not error_rule",  # which random calls are held to
    ),
    "binaries": binaries,
    "kills": tested(
        "runs killed at every write of their checkpoints, and at random", "≥ 100 and ≥ 40, no loss diverges",
        "a checkpoint written in place (seeded bug)", "tests/train/test_kill.py",
        "tests/train/test_checkpoint.py", "tests/test_durable.py", "-m", "slow or not slow",
    ),
    "files": files,
    "trained": trained,
    "distributed": tested(
        "training divided over 2 and 4 processes (DDP, FSDP, TP, CP, PP, nine combinations), replicas apart, "
        "processes killed and hung, a link cut between two network namespaces",
        "losses, norms and gradients of one process to 1e-5; the same bits after a restart",
        "gradients of one process's tokens alone: test_a_wrong_gradient_is_seen",
        "tests/parallel/test_exact.py", "tests/parallel/test_failure.py", "tests/parallel/test_link.py",
        "tests/parallel/test_savers.py", "-m", "slow or not slow",
    ),
}  # fmt: skip


def run(names: list[str], say: Callable[[str], None]) -> Iterator[tuple[Row, float, list[str]]]:
    """The rows of these parts, their seconds, what is left; one that breaks off does not end the others."""
    for i, name in enumerate(names, 1):
        start = time.perf_counter()
        say(f"{name} ...")
        try:
            for row in PARTS[name]():
                yield row, time.perf_counter() - start, names[i:]
        except Exception as error:
            said = f"broke off: {type(error).__name__}: {error}".splitlines()[0]
            row = Row(name, "all of it", said, False, "none", f"python tests/proof {name}")
            yield row, time.perf_counter() - start, names[i:]


def _list(items: list[str]) -> str:
    return "\n".join(f"- {item}" for item in items[:SHOWN])
