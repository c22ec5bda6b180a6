"""Byte-pair encoding through the Hugging Face library `tokenizers`: trained here, or loaded.

Sennrich, Haddow, Birch 2016, arXiv:1508.07909; on bytes: Radford et al. 2019 (GPT-2), sec. 2.2.
"""

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..errors import UserError
from .tokenizer import END_OF_TEXT, Tokenizer, integers

if TYPE_CHECKING:
    import tokenizers

ENDS = (END_OF_TEXT, "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "</s>", "<eos>", "[SEP]")


class BPETokenizer(Tokenizer):
    """A tokenizer of the library `tokenizers`, of any model that the library knows.

    Args:
        inner: the library's object.
    """

    kind = "bpe"

    def __init__(self, inner: "tokenizers.Tokenizer") -> None:
        inner.encode_special_tokens = True  # the name of a special token in a text is text
        inner.no_padding()
        inner.no_truncation()
        self.inner = inner

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, special: Sequence[str] = (END_OF_TEXT,)
    ) -> "BPETokenizer":
        """Learn a byte-level BPE, GPT-2's kind, from `texts`; all special tokens count in `vocab_size`.

        Raises:
            UserError: a vocabulary too small for the 256 bytes.
        """
        library = _library()
        if vocab_size < 256 + len(special):
            raise UserError(
                f"the vocabulary has {vocab_size} tokens, expected at least {256 + len(special)}: "
                "256 bytes and the special tokens"
            )
        inner = library.Tokenizer(library.models.BPE())
        inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size - len(special),
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        inner.add_special_tokens(list(special))
        return cls(inner)

    @classmethod
    def from_hub(cls, name: str) -> "BPETokenizer":
        """The tokenizer of a model on the Hugging Face hub, such as "gpt2"; from its cache if it is there."""
        try:
            return cls(_library().Tokenizer.from_pretrained(name))
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"tokenizer {name!r} cannot be had from the hub ({error}); give a tokenizer.json of its model"
            ) from None

    def __len__(self) -> int:
        return max(self.inner.get_vocab_size(), 1 + max(self.special.values(), default=0))  # some leave gaps

    @property
    def special(self) -> dict[str, int]:
        added = self.inner.get_added_tokens_decoder()
        return {token.content: number for number, token in sorted(added.items()) if token.special}

    @property
    def end_of_text(self) -> int | None:
        special = self.special
        return next((special[name] for name in ENDS if name in special), None)

    def add_special(self, name: str) -> int:
        self.inner.add_special_tokens([name])
        return self.inner.token_to_id(name)

    def encode_array(self, text: str) -> np.ndarray:
        return np.asarray(self.inner.encode(text, add_special_tokens=False).ids, np.uint32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        done = self.inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(each.ids, np.uint32) for each in done]

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        return self.inner.decode(integers(tokens), skip_special_tokens=False)

    def to_json(self) -> str:
        return self.inner.to_str()

    @classmethod
    def from_json(cls, text: str) -> "BPETokenizer":
        return cls(_library().Tokenizer.from_str(text))


def _library():
    try:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError:
        raise UserError("BPE needs the library tokenizers; `pip install llmkern[data]`") from None
    return tokenizers
