"""From files to shards of tokens: normalise, filter, remove duplicates, split by document, tokenise.

Sources are read twice (three times to train a BPE), so that memory grows with the number of documents, by
some 1.5 KB each, and not with their length.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import durable
from ..errors import UserError
from .bpe import BPETokenizer
from .clean import Filter, normalise
from .duplicates import Duplicates, signature
from .parallel import parallel_map
from .shards import SPLITS, ShardWriter
from .sources import Sources
from .tokenizer import END_OF_TEXT, ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from datasketch import LeanMinHash

CHUNK = 2**21  # characters that a worker takes at once
Progress = Callable[[str, int], None]  # what is being done, documents so far


@dataclass(frozen=True)
class Options:
    """How to prepare data.

    Attributes:
        tokenizer: "char", "byte", "bpe" (trained here), "hub:NAME" or the path of a tokenizer.json.
        vocab_size: of a BPE that is trained here.
        val: share of the documents to validate with; of a single document its last part.
        seed: which documents these are.
        filter: which documents are kept.
        near_duplicates: similarity from which two documents are the same; 0 removes equal ones alone.
        workers: processes; 0 is one for each core.
    """

    tokenizer: str = "char"
    vocab_size: int = 4096
    val: float = 0.1
    seed: int = 0
    filter: Filter = field(default_factory=Filter)
    near_duplicates: float = 0.8
    workers: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.val < 1:
            raise UserError(f"val is {self.val}, expected a share from 0 to below 1, such as 0.1")
        if not 0 <= self.near_duplicates <= 1:
            raise UserError(f"near-duplicates is {self.near_duplicates}, expected a similarity from 0 to 1")
        if self.workers < 0:
            raise UserError(f"workers is {self.workers}, expected 0 or more")


class Seen(NamedTuple):
    """What the first reading keeps of a document."""

    dropped: str | None  # why
    digest: bytes = b""
    characters: frozenset = frozenset()
    sketch: "LeanMinHash | None" = None


@dataclass
class Survey:
    """What the first reading found.

    Attributes:
        splits: for every document the split it goes to, or None if it is dropped.
        dropped: reason -> number of documents.
        characters: all that occur.
    """

    splits: list[str | None] = field(default_factory=list)
    dropped: Counter = field(default_factory=Counter)
    characters: set[str] = field(default_factory=set)

    @property
    def kept(self) -> int:
        return sum(split is not None for split in self.splits)


def prepare(
    sources: Sources, out: Path, options: Options, progress: Progress = lambda stage, documents: None
) -> dict[str, Any]:
    """Make the folder `out` of tokens; it appears whole or not at all.

    Returns:
        Its manifest.

    Raises:
        UserError: a source that cannot be read, nothing left to train on, no room on the disk.
    """
    survey = _survey(sources, options, progress)
    tokenizer = _tokenizer(sources, survey, options, progress)
    if survey.kept > 1 and tokenizer.end_of_text is None:
        tokenizer.add_special(END_OF_TEXT)
    try:
        with durable.NewFolder(out) as folder:
            dtype = np.dtype("<u2" if len(tokenizer) <= 2**16 else "<u4")
            counts = _write(folder, sources, survey, tokenizer, dtype, options, progress)
            folder.write("tokenizer.json", [tokenizer.to_json().encode()])
            folder.about = {
                "format": 1,
                "tokenizer": {
                    "kind": tokenizer.kind, "tokens": len(tokenizer), "sha256": tokenizer.sha256(),
                },
                "dtype": dtype.str,
                "splits": counts,
                "split": "by document" if survey.kept > 1 else "by position",
                "documents": len(survey.splits),
                "dropped": dict(survey.dropped),
                "sources": sources.paths(),
                "options": asdict(options),
            }  # fmt: skip
    except OSError as error:
        raise UserError(
            f"data cannot be written to {str(out)!r} ({error.strerror}); make room or choose another folder"
        ) from None
    return durable.read_manifest(out)


def _survey(sources: Sources, options: Options, progress: Progress) -> Survey:
    """Read every document once and decide what becomes of it."""
    survey, digests, order = Survey(), set(), {}
    chunks = _chunks(sources)
    first = list(islice(chunks, 2))
    several = sum(map(len, first)) > 1
    known = Duplicates(options.near_duplicates) if options.near_duplicates and several else None
    examine = partial(_examine, options.filter, known is not None)
    for seen in _flatten(parallel_map(examine, chain(first, chunks), options.workers)):
        why = seen.dropped
        if not why and seen.digest in digests:
            why = "duplicate"
        if not why and known and known.seen(seen.sketch):
            why = "near-duplicate"
        if why:
            survey.dropped[why] += 1
        else:
            digests.add(seen.digest)
            order[len(survey.splits)] = hashlib.sha256(b"%d " % options.seed + seen.digest).digest()
            survey.characters |= seen.characters
        survey.splits.append(None if why else "train")
        progress("reading", len(survey.splits))
    _check(survey, sources)
    if len(order) > 1 and options.val:  # by what the documents say, wherever they stand
        count = min(len(order) - 1, max(1, round(options.val * len(order))))
        for i in sorted(order, key=order.__getitem__)[:count]:
            survey.splits[i] = "val"
    return survey


def _check(survey: Survey, sources: Sources) -> None:
    if not survey.kept:
        why = ", ".join(f"{n} {reason}" for reason, n in survey.dropped.items()) or "the sources hold none"
        raise UserError(f"no document is left to train on ({why}); give other sources or milder filters")
    if len(survey.characters) < 2:
        (one,) = survey.characters
        raise UserError(f"the text has one distinct character, {one!r}, so there is nothing to learn from it")


def _examine(rules: Filter, sketches: bool, texts: list[str]) -> list[Seen]:
    """In a worker: what the survey has to know of some documents."""
    result = []
    for text in map(normalise, texts):
        if why := rules.why_not(text):
            result.append(Seen(why))
            continue
        digest = hashlib.sha256(text.encode(errors="surrogatepass")).digest()
        sketch = signature(text) if sketches else None
        result.append(Seen(None, digest, frozenset(text), sketch))
    return result


def _tokenizer(sources: Sources, survey: Survey, options: Options, progress: Progress) -> Tokenizer:
    name = options.tokenizer
    if name == "char":
        return CharTokenizer(survey.characters)
    if name == "byte":
        return ByteTokenizer()
    if name == "bpe":
        texts = (text for text, split in _kept(sources, survey, options) if split == "train")
        return BPETokenizer.train(_count(texts, "training the tokenizer", progress), options.vocab_size)
    if name.startswith("hub:"):
        return BPETokenizer.from_hub(name.removeprefix("hub:"))
    if not Path(name).exists():
        raise UserError(
            f"tokenizer is {name!r}, expected char, byte, bpe, hub:NAME or the path of a tokenizer.json"
        )
    return load_tokenizer(name)


def _kept(sources: Sources, survey: Survey, options: Options) -> Iterator[tuple[str, str]]:
    """(text, split) of every kept document, normalised; a single one is cut in two."""
    for text, split in zip(sources, survey.splits):
        if split is None:
            continue
        text = normalise(text)
        if survey.kept > 1 or not options.val:
            yield text, split
        else:
            end = int((1 - options.val) * len(text))
            yield text[:end], "train"
            yield text[end:], "val"


def _write(
    folder: durable.NewFolder,
    sources: Sources,
    survey: Survey,
    tokenizer: Tokenizer,
    dtype: np.dtype,
    options: Options,
    progress: Progress,
) -> dict[str, dict[str, int]]:
    """Tokenise every kept document into the shards of its split; returns the counts of each."""
    counts = {split: dict.fromkeys(("tokens", "documents", "characters", "bytes"), 0) for split in SPLITS}
    encode = partial(_encode, tokenizer)
    workers = 1 if isinstance(tokenizer, BPETokenizer) else options.workers  # it has threads of its own
    with ExitStack() as stack:
        writers = {s: stack.enter_context(ShardWriter(folder, s, dtype)) for s in SPLITS}
        pieces = _count(_kept(sources, survey, options), "tokenising", progress)
        for done in parallel_map(encode, _chunks(pieces, key=lambda piece: len(piece[0])), workers):
            for split, tokens, characters, size in done:
                writers[split].write(tokens)
                counted = (len(tokens), 1, characters, size)
                for name, value in zip(counts[split], counted):
                    counts[split][name] += value
    return {split: count for split, count in counts.items() if count["tokens"]}


def _encode(tokenizer: Tokenizer, pieces: list[tuple[str, str]]) -> list[tuple[str, np.ndarray, int, int]]:
    """In a worker: (text, split) to (split, tokens, characters, bytes)."""
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    encoded = tokenizer.encode_batch([text for text, _ in pieces])
    return [
        (split, np.append(tokens, end).astype(np.uint32), len(text), len(text.encode(errors="surrogatepass")))
        for (text, split), tokens in zip(pieces, encoded)
    ]


def _chunks(items: Iterable, key: Callable[[Any], int] = len) -> Iterator[list]:
    """Lists of neighbours whose lengths sum to some CHUNK."""
    chunk, size = [], 0
    for item in items:
        chunk.append(item)
        size += key(item)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _flatten(lists: Iterable[list[Seen]]) -> Iterator[Seen]:
    for each in lists:
        yield from each


def _count(items: Iterable, stage: str, progress: Progress) -> Iterator:
    for number, item in enumerate(items, 1):
        progress(stage, number)
        yield item
