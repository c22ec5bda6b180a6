"""GGUF files put together by the letter of the specification."""

import struct


def string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def entry(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def info(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def build(entries=(), tensors=(), data=b"", version=3, magic=b"GGUF", alignment=32, counts=None) -> bytes:
    n, m = counts or (len(tensors), len(entries))
    head = magic + struct.pack("<IQQ", version, n, m) + b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data
