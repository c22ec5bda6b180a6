"""Text to train on: corpora, tokenizers, batches."""

from .batches import Batches, split
from .bpe import BPETokenizer
from .corpus import Corpus, load
from .tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "BPETokenizer",
    "Batches",
    "ByteTokenizer",
    "CharTokenizer",
    "Corpus",
    "Tokenizer",
    "load",
    "load_tokenizer",
    "split",
]
