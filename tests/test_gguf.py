"""The GGUF reader, on files put together here by the letter of the specification."""

import struct
from pathlib import Path

import pytest
import torch
from gguf_file import build, entry, info, string

from llmkern.models import GGUF, GGUFError
from llmkern.nn import QuantLinear
from llmkern.ops import QuantWeight, dequantize


def read(path: Path, data: bytes) -> GGUF:
    path.write_bytes(data)
    return GGUF(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.gguf"


def test_metadata(path):
    array = struct.pack("<IQ", 8, 2) + string("a") + string("é")
    nested = struct.pack("<IQ", 9, 1) + struct.pack("<IQ3h", 3, 3, 1, -2, 3)
    entries = [
        entry("u8", 0, b"\xff"), entry("i8", 1, b"\xff"), entry("u16", 2, struct.pack("<H", 65535)),
        entry("i32", 5, struct.pack("<i", -7)), entry("f32", 6, struct.pack("<f", 0.5)),
        entry("bool", 7, b"\x01"), entry("name", 8, string("gpt2")), entry("words", 9, array),
        entry("nested", 9, nested), entry("u64", 10, struct.pack("<Q", 2**64 - 1)),
        entry("f64", 12, struct.pack("<d", 0.1)),
    ]  # fmt: skip
    assert read(path, build(entries)).metadata == {
        "u8": 255, "i8": -1, "u16": 65535, "i32": -7, "f32": 0.5, "bool": True, "name": "gpt2",
        "words": ["a", "é"], "nested": [[1, -2, 3]], "u64": 2**64 - 1, "f64": 0.1,
    }  # fmt: skip


@pytest.mark.parametrize("kind, dtype", [(0, torch.float32), (1, torch.float16), (30, torch.bfloat16)])
@pytest.mark.parametrize("alignment", [32, 64])
def test_dense(kind, dtype, alignment, path):
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    entries = [entry("general.alignment", 4, struct.pack("<I", alignment))]
    data = x.view(torch.uint8).numpy().tobytes()
    gap = -len(data) % alignment
    tensors = [
        info("x", (5, 3), kind, 0),
        info("y", (5, 3), kind, len(data) + gap),
        info("none", (0,), kind, 0),
    ]
    file = read(path, build(entries, tensors, data + bytes(gap) + data, alignment=alignment))
    assert torch.equal(file.tensor("x"), x) and torch.equal(file.tensor("y"), x)
    assert file.tensors["x"].shape == (3, 5) and file.tensor("none").shape == (0,)
    before = path.read_bytes()
    file.tensor("x").zero_()
    assert path.read_bytes() == before


def blocks(kind: int) -> tuple[bytes, list[float]]:
    """Two blocks of 32 and their 64 values, by ggml's dequantize_row_q4_0, q4_1 and q8_0."""
    data, values = b"", []
    for d, m in ((0.5, -3.0), (-0.0123, 7.7)):
        d, m = (struct.unpack("<e", struct.pack("<e", v))[0] for v in (d, m))
        if kind == 8:
            codes = [(37 * i) % 256 - 128 for i in range(32)]
            data += struct.pack("<e32b", d, *codes)
            values += [q * d for q in codes]
            continue
        quants = bytes((i * 29 + 200) % 256 for i in range(16))
        low, high = [q & 15 for q in quants], [q >> 4 for q in quants]
        data += struct.pack("<e", d) + (struct.pack("<e", m) if kind == 3 else b"") + quants
        values += [q * d + m if kind == 3 else (q - 8) * d for q in low + high]
    return data, values


@pytest.mark.parametrize("kind", [2, 3, 8], ids=["Q4_0", "Q4_1", "Q8_0"])
def test_quantised(kind, path):
    data, values = blocks(kind)
    for dims, shape in (((64, 1), (1, 64)), ((32, 2), (2, 32))):
        weight = read(path, build((), [info("w", dims, kind, 0)], data)).tensor("w")
        assert isinstance(weight, QuantWeight) and weight.scales.dtype == torch.float16
        exact = torch.tensor(values, dtype=torch.float64).view(shape)
        assert torch.equal(dequantize(*weight, torch.float64), exact)
        x = torch.randn(3, shape[1])
        torch.testing.assert_close(QuantLinear(weight)(x), x @ exact.float().T, rtol=1e-4, atol=1e-3)


GOOD = [info("x", (4,), 0, 0)]
MALFORMED = {
    "empty": (b"", "has 0 bytes"),
    "magic": (build(magic=b"GGML"), "begins with b'GGML'"),
    "version": (build(version=1), "version is 1"),
    "big-endian": (build(version=3 << 24), "expected 2 or 3"),
    "tensors": (build(counts=(2**60, 0)), "number of tensors is 1152921504606846976"),
    "entries": (build(counts=(0, 2**60)), "number of metadata entries"),
    "key": (build([struct.pack("<Q", 2**63) + b"k" * 20]), "length of a metadata key"),
    "not UTF-8": (build([struct.pack("<Q", 1) + b"\xff" + struct.pack("<IB", 0, 1)]), "not UTF-8"),
    "type": (build([entry("k", 13, b"\x00" * 8)]), "'k' is of type 13"),
    "array": (build([entry("k", 9, struct.pack("<IQ", 6, 2**61))]), "length of 'k'"),
    "array type": (build([entry("k", 9, struct.pack("<IQ", 77, 1) + bytes(8))]), "of type 77"),
    "nesting": (build([entry("k", 9, struct.pack("<IQ", 9, 1) * 4000)]), "at depth 8"),
    "cut off": (build([entry("k", 10, b"")], alignment=1), "needs 8 bytes at 37"),
    "dimensions": (build((), [info("x", (1,) * 5, 0, 0)]), "5 dimensions"),
    "outside": (build((), GOOD, bytes(15)), "has 16 bytes from"),
    "offset": (build((), [info("x", (4,), 0, 2**63)], bytes(16)), "inside the file"),
    "unaligned": (build((), [info("x", (4,), 0, 4)], bytes(64)), "multiple of 32"),
    "large": (build((), [info("x", (2**62, 2**62), 0, 0)], bytes(16)), "inside the file"),
    "huge": (build((), [info("x", (0, 2**63), 0, 0)], bytes(16)), "dimensions below 2**63"),
    "row": (build((), [info("x", (40, 2), 8, 0)], bytes(99)), "rows of a multiple of 32"),
    "names": (build((), GOOD * 2, bytes(64)), "2 tensors have 1 names"),
    "alignment": (
        build([entry("general.alignment", 4, bytes(4))], GOOD, bytes(64)),
        "general.alignment is 0",
    ),
}


@pytest.mark.parametrize(("data", "words"), MALFORMED.values(), ids=MALFORMED)
def test_malformed(data, words, path):
    with pytest.raises(GGUFError) as caught:
        read(path, data)
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_cut_anywhere(path):
    """A file cut off at any byte is refused, or lacks nothing that it lists."""
    data, _ = blocks(8)
    whole = build([entry("a", 9, struct.pack("<IQ", 8, 1) + string("b"))], [info("w", (64, 1), 8, 0)], data)
    for size in range(len(whole)):
        with pytest.raises(GGUFError):
            read(path, whole[:size])
    assert read(path, whole).tensor("w").qweight.shape == (1, 64)


def test_types_that_are_not_read(path):
    file = read(path, build((), [info("k", (256,), 12, 0), info("v", (32,), 8, 0)], bytes(256)))
    with pytest.raises(GGUFError, match="'k' is of type 12, expected one of F32"):
        file.tensor("k")
    with pytest.raises(GGUFError, match="expected a matrix"):
        file.tensor("v")
