"""Text to train on: corpora, tokenizers, batches."""

from .batches import Batches, split
from .corpus import Corpus, load
from .tokenizer import CharTokenizer

__all__ = ["Batches", "CharTokenizer", "Corpus", "load", "split"]
