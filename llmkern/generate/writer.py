"""Tokens to text while they come: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence

from ..text import Tokenizer

BROKEN = "\ufffd"  # what an unfinished character decodes to


class Writer:
    """Takes a text's tokens one by one and gives the pieces that are certain.

    Args:
        tokenizer: decodes.
        stops: strings that end the text before them.

    Attributes:
        text: all pieces so far.
        stopped: whether a stop string came.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.text, self.stopped = "", False
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        self._tokens: list[int] = []
        self._before = self._after = 0  # tokens [before, after) are decoded; later ones need them to join on

    def add(self, token: int) -> str:
        """The text that one more token makes certain; may be empty."""
        self._tokens.append(token)
        return self._give(self._decode(unfinished=False), final=False)

    def end(self) -> str:
        """What was held back, now that no token comes."""
        return self._give(self._decode(unfinished=True), final=True)

    def _decode(self, unfinished: bool) -> str:
        """The text of the tokens behind those decoded, unless its last character lacks bytes."""
        known = self.tokenizer.decode(self._tokens[self._before : self._after])
        longer = self.tokenizer.decode(self._tokens[self._before :])
        if len(longer) <= len(known) or (longer.endswith(BROKEN) and not unfinished):
            return ""
        self._before, self._after = self._after, len(self._tokens)
        return longer[len(known) :]

    def _give(self, new: str, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += new
        ends = [at for at in (self._held.find(stop) for stop in self.stops) if at >= 0]
        if ends:
            self.stopped = True
            piece, self._held = self._held[: min(ends)], ""
        else:
            keep = 0 if final else max((_overlap(self._held, stop) for stop in self.stops), default=0)
            split = len(self._held) - keep
            piece, self._held = self._held[:split], self._held[split:]
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
