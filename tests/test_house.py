"""The plan of the house: imports go down, families agree in every room, an op is declared once."""

import ast
from pathlib import Path

import pytest
import torch
from error_rule import run

from llmkern.ops import OPS, implementations

ROOT = Path(__file__).parent.parent
FAMILIES = sorted({op.family for op in OPS.values()})

# room -> the rooms of this project that it may import
MAY_IMPORT = {
    "kernels": {"kernels"},
    "llmkern/ops": {"ops", "_cpu"},
    "llmkern/nn": {"nn", "ops"},
    "llmkern/swap": {"swap", "nn", "ops", "report"},
    "llmkern/compile": {"compile", "nn", "ops", "report"},
    "llmkern/prove": {"prove", "swap", "report", "load", "models", "errors"},
    "llmkern/models": {"models", "nn", "ops", "errors"},
    "llmkern/text": {"text", "durable", "errors"},
    "llmkern/diagnose": {
        "diagnose",
        "ops",
        "models",
        "optim",
        "plan",
        "swap",
        "quantize",
        "load",
        "ceilings",
        "clock",
        "machine",
        "errors",
        "__version__",
    },
    "llmkern/plan": {"plan", "models", "errors", "display"},
    "llmkern/generate": {"generate", "models", "text", "load", "errors"},
    "llmkern/evaluate": {"evaluate", "generate", "models", "text", "load", "display", "plots", "errors"},
    "llmkern/finetune": {
        "finetune",
        "evaluate",
        "models",
        "text",
        "train",
        "lora",
        "load",
        "display",
        "errors",
    },
    "llmkern/parallel": {"parallel", "models", "nn", "ops", "errors"},
    "llmkern/train": {"train", "parallel", "models", "text", "ops", "optim", "durable", "errors"},
}


def imported_rooms(path: Path, package: str) -> set[str]:
    """The rooms of llmkern that a file imports, by static reading."""
    here = [*package.replace("llmkern", "").strip("/").split("/"), path.stem]
    here = [part for part in here if part]
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name.split(".")[1] for a in node.names if a.name.startswith("llmkern.")]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level]
            full = [*base, *(node.module or "").split(".")] if node.module else base
            full = [part for part in full if part]
            names = [full[0]] if full else [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llmkern."):
            names = [node.module.split(".")[1]]
        rooms.update(names)
    return rooms


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_go_down(room: str):
    for path in sorted((ROOT / room).glob("*.py")):
        if room == "kernels":
            assert "llmkern" not in path.read_text().replace("`llmkern", ""), path.name
            continue
        if path.name == "command.py":  # of `llmkern ROOM`, which may show and call everything
            continue
        up = imported_rooms(path, room) - MAY_IMPORT[room]
        assert not up, f"{room}/{path.name} imports {', '.join(sorted(up))}"


def test_imports_are_seen(tmp_path: Path):
    """The reader above finds what it looks for."""
    file = tmp_path / "x.py"
    file.write_text("from .. import swap\nfrom ..nn import norm\nfrom .op import Op\nimport llmkern.cli\n")
    assert imported_rooms(file, "llmkern/ops") == {"swap", "nn", "ops", "cli"}


@pytest.mark.parametrize("family", FAMILIES)
def test_family_has_its_four_rooms(family: str):
    rooms = [f"llmkern/ops/{family}.py", f"kernels/{family}.py"]
    for room in rooms:
        assert (ROOT / room).exists(), room
    modules = [f"llmkern/nn/{family}.py", f"llmkern/{family}.py"]  # an optimizer is no nn.Module
    assert any((ROOT / module).exists() for module in modules), modules
    assert list((ROOT / "csrc").glob(f"{family}*.cpp")), f"csrc/{family}.cpp"


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_every_op_has_three_implementations(op):
    for backend, state in implementations(op).items():
        assert state.startswith("yes"), f"{op.name} on {backend}: {state}"


def test_kernels_package_is_empty():
    """Other projects probe any importable package named kernels: ours must hold only a docstring."""
    tree = ast.parse((ROOT / "kernels/__init__.py").read_text())
    assert len(tree.body) == 1 and ast.get_docstring(tree)


def test_one_openmp_runtime():
    """The kernels share torch's threads: torch.set_num_threads governs both, one libgomp is loaded."""
    run(OPS["layer_norm"], next(iter(OPS["layer_norm"].samples(_make()))), backend="cpp")
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    lines = [line for line in maps.read_text().splitlines() if "scikit_learn" not in line]  # it has its own
    runtimes = {line.split()[-1] for line in lines if "libgomp" in line}
    assert len(runtimes) <= 1, runtimes


def _make():
    from llmkern.ops.op import Make

    return Make(torch.float32)
