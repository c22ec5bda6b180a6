"""Files of every kind that is read, harmed at random: each is refused in one sentence, or read as a file.

Nothing else may come of it: no exception of Python or of a library, no crash, no memory beyond
`MEMORY`.  A file that a checksum seals is never accepted.
"""

import json
import multiprocessing
import os
import random
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from gguf_file import build, entry, info, string, write_llama
from small_run import make_data

from llmkern.durable import Damaged
from llmkern.errors import UserError
from llmkern.models import (
    GGUF,
    GPT,
    GPTConfig,
    Llama,
    LlamaConfig,
    from_pretrained,
    load_gguf,
    save_pretrained,
)
from llmkern.text import BPETokenizer, ByteTokenizer, CharTokenizer, load_tokenizer
from llmkern.text.labelled import read_table
from llmkern.text.shards import Data
from llmkern.train import checkpoint
from llmkern.train.config import RunConfig
from llmkern.train.keys import read_file

PART = 500  # files that a process harms at a time
MEMORY = 256 * 2**20  # bytes of address space that a reader of these small files may take
SMALL = GPTConfig(vocab_size=7, block_size=8, n_layer=1, n_head=2, n_embd=8)


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        write: makes a whole one in a folder; returns the files to harm.
        read: reads it from that folder.
        sealed: whether a checksum covers every byte.
    """

    name: str
    write: Callable[[Path], list[Path]]
    read: Callable[[Path], object]
    sealed: bool = False


@dataclass
class Tally:
    """What became of the harmed files of one kind."""

    kind: str
    tried: int = 0
    refused: int = 0
    bad: list[str] = field(default_factory=list)

    def join(self, other: "Tally") -> None:
        self.tried += other.tried
        self.refused += other.refused
        self.bad += other.bad


def _file(name: str, data: bytes) -> Callable[[Path], list[Path]]:
    def write(folder: Path) -> list[Path]:
        path = folder / name
        path.write_bytes(data)
        return [path]

    return write


def _checkpoint(folder: Path) -> list[Path]:
    torch.manual_seed(0)
    path = checkpoint.save(folder, 1, GPT(SMALL), CharTokenizer("abcdefg"))
    return list(path.iterdir())


def _read_checkpoint(folder: Path) -> object:
    found = checkpoint.read(folder / "checkpoints/step-00000001")
    return found.model_tensors(), found.tokenizer()


def _dataset(folder: Path) -> list[Path]:
    return list(make_data(folder / "data").iterdir())


def _read_dataset(folder: Path) -> object:
    data = Data(folder / "data")
    return [data.tokens(split).windows(np.array([0, 50]), 9) for split in data.splits]


def _weights(folder: Path) -> list[Path]:
    torch.manual_seed(0)
    save_pretrained(GPT(SMALL), folder)
    return list(folder.iterdir())


def _gguf(folder: Path) -> list[Path]:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    dense, blocks = x.numpy().tobytes(), bytes(range(34)) * 8
    entries = [
        entry("general.architecture", 8, string("llama")),
        entry("general.alignment", 4, struct.pack("<I", 32)),
        entry("words", 9, struct.pack("<IQ", 8, 2) + string("a") + string("b")),
    ]
    tensors = [info("dense", (64, 4), 0, 0), info("coded", (64, 4), 8, len(dense))]
    return _file("x.gguf", build(entries, tensors, dense + blocks))(folder)


def _read_gguf(folder: Path) -> object:
    file = GGUF(folder / "x.gguf")
    return [file.tensor(name) for name in file.tensors]


def _gguf_model(folder: Path) -> list[Path]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=13, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    write_llama(folder / "model.gguf", Llama(config), coded="mlp")
    return [folder / "model.gguf"]


def _bpe(folder: Path) -> list[Path]:
    return [BPETokenizer.train(["the cat sat on the mat"] * 9, 280).save(folder)]


def _plain_tokenizer(folder: Path) -> list[Path]:
    return [
        CharTokenizer("abc d", ["<end>"]).save(folder),
        ByteTokenizer(["<x>"]).save(folder / "bytes.json"),
    ]


def _read_tokenizers(folder: Path) -> object:
    return [load_tokenizer(path).encode("a") for path in folder.iterdir()]


def _parquet(folder: Path) -> list[Path]:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": ["good", "bad"], "label": ["1", "0"]}), folder / "t.parquet")
    return [folder / "t.parquet"]


def _table(name: str) -> Callable[[Path], object]:
    return lambda folder: read_table(folder / name)


def _config(name: str) -> Callable[[Path], object]:
    return lambda folder: RunConfig.make(read_file(folder / name), name)


CSV = "text,label\n" + "".join(f'"it is, they say, {i}",{i % 3}\n' for i in range(20))
JSONL = "".join(json.dumps({"text": f"it is {i} é", "label": i % 3}) + "\n" for i in range(20))
YAML = "steps: 10\nlearning_rate: 1e-3\nbetas: [0.9, 0.95]\nschedule: cosine\nplot: false\ndata: here\n"
TOML = (
    'steps = 10\nlearning_rate = 1e-3\nbetas = [0.9, 0.95]\nschedule = "cosine"\nplot = false\ndata = "x"\n'
)
KINDS = [
    Kind("checkpoint", _checkpoint, _read_checkpoint, sealed=True),
    Kind("prepared data", _dataset, _read_dataset, sealed=True),
    Kind("Hugging Face folder", _weights, from_pretrained),
    Kind("GGUF", _gguf, _read_gguf),
    Kind("GGUF model", _gguf_model, lambda folder: load_gguf(folder / "model.gguf")),
    Kind("tokenizer, BPE", _bpe, _read_tokenizers),
    Kind("tokenizer, ours", _plain_tokenizer, _read_tokenizers),
    Kind("table, CSV", _file("t.csv", CSV.encode()), _table("t.csv")),
    Kind("table, JSONL", _file("t.jsonl", JSONL.encode()), _table("t.jsonl")),
    Kind("table, Parquet", _parquet, _table("t.parquet")),
    Kind("config, TOML", _file("c.toml", TOML.encode()), _config("c.toml")),
    Kind("config, YAML", _file("c.yaml", YAML.encode()), _config("c.yaml")),
]


def harm(data: bytes, chance: random.Random) -> bytes:
    """The bytes with one to three mistakes, and different from before."""
    changed = data
    while changed == data:
        for _ in range(chance.choice((1, 1, 2, 3))):
            changed = chance.choice(MISTAKES)(changed, chance)
    return changed


def _flip(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data) or 1)
    return data[:at] + bytes((b ^ 1 << chance.randrange(8)) for b in data[at : at + 1]) + data[at + 1 :]


def _cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def _number(data: bytes, chance: random.Random) -> bytes:
    """Some bytes become a number that is large, or negative, or zero."""
    value = chance.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64 // 34 + 1))
    size = chance.choice((4, 8))
    at = chance.randrange(len(data) + 1)
    return data[:at] + (value % 2 ** (8 * size)).to_bytes(size, "little") + data[at + size :]


def _digits(data: bytes, chance: random.Random) -> bytes:
    """A digit of a text becomes another number, or none."""
    places = [i for i, b in enumerate(data[:4096]) if 48 <= b < 58] or [0]
    at = chance.choice(places)
    text = chance.choice((b"-1", b"1e999", b"99999999999999999999", b"0", b"NaN", b"null", b"[]", b'"x"'))
    return data[:at] + text + data[at + 1 :]


def _move(data: bytes, chance: random.Random) -> bytes:
    """A piece is copied, or left out."""
    a, b = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    b = min(b, a + 64)
    return data[:b] + data[a:] if chance.random() < 0.5 else data[:a] + data[b:]


def _noise(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data) + 1)
    return data[:at] + chance.randbytes(chance.randrange(1, 9)) + data[at:]


MISTAKES = (_flip, _flip, _cut, _number, _digits, _move, _noise)


def try_kind(kind: Kind, seeds: range) -> Tally:
    """Harm one file of the kind for each seed, and read it."""
    tally = Tally(kind.name)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = {path: path.read_bytes() for path in sorted(kind.write(folder))}
        kind.read(folder)  # what is whole is read
        with _limited_memory():
            for seed in seeds:
                chance = random.Random(f"{kind.name} {seed}")
                path = chance.choice(list(whole))
                path.write_bytes(harm(whole[path], chance))
                try:
                    kind.read(folder)
                    if kind.sealed:
                        tally.bad.append(f"{kind.name} {seed}: a changed {path.name} was accepted")
                except (UserError, Damaged) as refusal:
                    tally.refused += 1
                    if len(str(refusal)) < 10:
                        tally.bad.append(f"{kind.name} {seed}: refused without a sentence")
                except BaseException as error:
                    tally.bad.append(f"{kind.name} {seed}: {type(error).__name__}: {error} ({path.name})")
                tally.tried += 1
                path.write_bytes(whole[path])
    return tally


class _limited_memory:
    """Inside the block, what the process has mapped may grow by `MEMORY` at most."""

    def __enter__(self) -> None:
        import resource

        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        self.before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, self.before[1]))

    def __exit__(self, *error: object) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, self.before)


def try_all(each: int, processes: int = 2) -> list[Tally]:
    """`each` harmed files of every kind, shared out over processes; a process that dies is an error."""
    starts = range(0, each, PART)
    jobs = [(i, range(start, min(each, start + PART))) for i in range(len(KINDS)) for start in starts]
    tallies = [Tally(kind.name) for kind in KINDS]
    with multiprocessing.get_context("fork").Pool(
        processes, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        running = [pool.apply_async(_part, job) for job in jobs]
        for (i, _), task in zip(jobs, running):
            tallies[i].join(task.get(timeout=600))
    return tallies


def _part(kind: int, seeds: range) -> Tally:
    return try_kind(KINDS[kind], seeds)
