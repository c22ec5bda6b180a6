"""What happens to each document before it becomes tokens: normalise, filter."""

import unicodedata
from collections import Counter
from dataclasses import dataclass


def normalise(text: str) -> str:
    """Unicode's canonical composition (NFC), line ends as \\n, without byte order mark and NUL."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff").replace("\0", "")
    return unicodedata.normalize("NFC", text)


@dataclass(frozen=True)
class Filter:
    """Which documents are kept; by default all that are not blank.

    Args:
        min_characters: the shortest document.
        max_repeated_lines: the largest share of lines that repeat an earlier one; Rae et al. 2021,
            Gopher, arXiv:2112.11446, table A1, has 0.3.
        min_letters: the smallest share of characters that are letters, among those not white.
    """

    min_characters: int = 1
    max_repeated_lines: float = 1.0
    min_letters: float = 0.0

    def why_not(self, text: str) -> str | None:
        """Why a normalised text is dropped, or None if it is kept."""
        if not text.strip():
            return "blank"
        if len(text) < self.min_characters:
            return "too short"
        if self.max_repeated_lines < 1 and _repeated_lines(text) > self.max_repeated_lines:
            return "repeated lines"
        if self.min_letters > 0 and _letters(text) < self.min_letters:
            return "too few letters"
        return None


def _repeated_lines(text: str) -> float:
    lines = Counter(line.strip() for line in text.splitlines() if line.strip())
    return 1 - len(lines) / max(1, lines.total())


def _letters(text: str) -> float:
    solid = [c for c in text if not c.isspace()]
    return sum(map(str.isalpha, solid)) / max(1, len(solid))
