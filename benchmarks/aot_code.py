"""What compiled GPU code does, read from its assembly: registers, spills, instructions, widths of accesses.

For NVIDIA this is the machine code (SASS) that Triton's own cuobjdump prints, for AMD the assembly.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

TENSOR_CORE = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma|v_smfmac|v_wmma)")
TF32 = re.compile(r"\.tf32|xf32")
ATOMIC = re.compile(r"\b(?:ATOMG?|REDG?|UTMARED\w*|(?:global|buffer|flat)_atomic_\w+)\b")
_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", re.MULTILINE)
_AMD = re.compile(r"^\s+((?:v|s|ds|buffer|global|flat|scratch|tensor)_\w+)", re.MULTILINE)
_AMD_WIDTHS = {
    "dwordx4": 16, "b128": 16, "dwordx3": 12, "b96": 12, "dwordx2": 8, "b64": 8, "dword": 4, "b32": 4,
    "ushort": 2, "sshort": 2, "short": 2, "u16": 2, "b16": 2, "ubyte": 1, "sbyte": 1, "byte": 1, "u8": 1,
    "b8": 1,
}  # fmt: skip
BULK = 4096  # bytes that one TMA instruction counts as moving: many, whatever its box


class Code(NamedTuple):
    """Of one kernel.

    Attributes:
        registers: of a thread.
        spills: instructions that spill or reload a register.
        instructions: in all.
        tensor: the tensor-core instruction, as PTX or the ISA names it, or "".
        wide: share of the bytes that global loads and stores move 16 or more at a time; each instruction
            counts once, wherever it stands.
        atomics: atomic instructions on global memory.
    """

    registers: int
    spills: int
    instructions: int
    tensor: str
    wide: float
    atomics: int


def read(kernel: Any) -> Code:
    """Read a kernel that Triton compiled."""
    return _nvidia(kernel) if "cubin" in kernel.asm else _amd(kernel)


def sass(kernel: Any) -> str:
    """The machine code of an NVIDIA kernel, and what it uses."""
    return _sass_of(kernel.asm["cubin"])


@lru_cache(maxsize=64)
def _sass_of(cubin: bytes) -> str:
    """Kept, since cuobjdump takes as long as a compilation, and ops share kernels."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-sass", "-res-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def exponentials_in_flight(kernel: Any) -> list[int]:
    """Exponentials while a product runs: for each wait for all products but one, those up to the next wait.

    A thread's exponentials in the same order as the waits of its loops (FlashAttention-3, sec. 3.2).
    """
    tokens = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\d)|(MUFU\.EX2)", sass(kernel))
    counts: list[int] = []
    running = False
    for wait, exponential in tokens:
        if wait:
            running = wait == "0x1"
            counts += [0] if running else []
        elif exponential and running:
            counts[-1] += 1
    return counts


def opcodes(text: str) -> list[str]:
    """Opcodes of SASS in order, such as `LDG.E.128`."""
    return _SASS.findall(text)


def _nvidia(kernel: Any) -> Code:
    text = sass(kernel)
    found = opcodes(text)
    tensor = TENSOR_CORE.search(kernel.asm["ptx"])
    return Code(
        int(re.search(r"REG:(\d+)", text)[1]),
        sum(op.startswith(("STL", "LDL")) for op in found),
        len(found),
        tensor[1] if tensor else "",
        _wide(filter(None, map(_sass_bytes, found))),
        sum(bool(ATOMIC.match(op)) for op in found),
    )


def _amd(kernel: Any) -> Code:
    text = kernel.asm["amdgcn"]
    count = {key: int(value) for key, value in re.findall(r"\.(\w+_count):\s+(\d+)", text)}
    found = _AMD.findall(text)
    tensor = TENSOR_CORE.search(text)
    return Code(
        count["vgpr_count"], count["vgpr_spill_count"], len(found), tensor[1] if tensor else "",
        _wide(filter(None, map(_amd_bytes, found))), sum(bool(ATOMIC.match(op)) for op in found),
    )  # fmt: skip


def _wide(widths: Iterator[int]) -> float:
    widths = list(widths)
    return sum(w for w in widths if w >= 16) / sum(widths) if widths else 1.0


def _sass_bytes(opcode: str) -> int:
    """Bytes that a thread moves between global memory and the chip by this instruction; 0 for others."""
    name, *parts = opcode.split(".")
    if name.startswith(("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP")):
        return BULK
    if name not in ("LDG", "STG", "LDGSTS"):
        return 0
    sizes = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((sizes[part] for part in parts if part in sizes), 4)


def _amd_bytes(opcode: str) -> int:
    if not re.match(r"(buffer|global|flat)_(load|store)", opcode):
        return 0
    width = next((p for p in reversed(opcode.split("_")) if p in _AMD_WIDTHS), "")
    return _AMD_WIDTHS.get(width, 0)
