"""Near-duplicates by MinHash and locality-sensitive hashing, through the library datasketch.

Broder 1997, On the Resemblance and Containment of Documents; Lee et al. 2022, arXiv:2107.06499.
"""

import zlib
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from datasketch import LeanMinHash

WORDS = 5  # in a shingle
PERMUTATIONS = 128
PIECE = 20_000  # shingles hashed at once; bounds the memory


def signature(text: str) -> "LeanMinHash":
    """The MinHash of the text's runs of 5 words, or of all its words where it has fewer."""
    datasketch = _library()
    words = text.lower().split()
    ends = range(WORDS, max(WORDS, len(words)) + 1)
    shingles = sorted({" ".join(words[end - WORDS : end]).encode() for end in ends})
    sketch = datasketch.MinHash(num_perm=PERMUTATIONS, hashfunc=zlib.crc32)
    for start in range(0, len(shingles), PIECE):
        sketch.update_batch(shingles[start : start + PIECE])
    return datasketch.LeanMinHash(sketch)


class Duplicates:
    """Remembers documents by their signatures, and tells whether one like it was there before.

    Args:
        threshold: estimated Jaccard similarity of their shingles from which two documents are the same.
    """

    def __init__(self, threshold: float) -> None:
        if not 0 < threshold <= 1:
            raise UserError(f"near_duplicates is {threshold}, expected a number above 0 and at most 1")
        self.threshold = threshold
        self.kept: list[LeanMinHash] = []
        self.index = _library().MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)

    def seen(self, sketch: "LeanMinHash") -> bool:
        """Whether a document like it was there; if not, it is remembered."""
        candidates = self.index.query(sketch)  # they share a band of the hash; the estimate decides
        if any(self.kept[i].jaccard(sketch) >= self.threshold for i in candidates):
            return True
        self.index.insert(len(self.kept), sketch)
        self.kept.append(sketch)
        return False


def _library():
    try:
        import datasketch
    except ImportError:
        raise UserError(
            "finding near-duplicates needs the library datasketch; `pip install llmkern[data]`, or turn it "
            "off with --near-duplicates 0"
        ) from None
    return datasketch
