"""A completion's text while it grows: whole characters only, cut before a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

Step = Callable[[int], str | None]


def stepper(tokenizer: Tokenizer) -> Step:
    """Feeds one token id at a time; gives the next piece of text, or None inside of a character."""
    stream = DecodeStream(skip_special_tokens=True)
    return lambda token: stream.step(tokenizer, token)


class Text:
    """The text of one completion, piece by piece.

    Attributes:
        text: what the completion says so far, without held-back parts that may turn out to be a stop string.
        stopped: a stop string has been met; `text` ends before it.
    """

    def __init__(self, step: Step, stop: Sequence[str] = ()) -> None:
        self._step = step
        self._stop = tuple(s for s in stop if s)
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; returns the piece of text that is certain now, often empty."""
        return self._take(self._step(token) or "")

    def finish(self, whole: str) -> str:
        """The completion has ended, and `whole` is the text of all its tokens: returns the last piece."""
        if self.stopped:
            return ""
        seen = self.text + self._held
        rest = whole[len(seen) :] if whole.startswith(seen) else ""
        piece = self._take(rest)
        if self.stopped:
            return piece
        held, self._held = self._held, ""
        self.text += held
        return piece + held

    def _take(self, piece: str) -> str:
        pending = self._held + piece
        cut = min((at for s in self._stop if (at := pending.find(s)) >= 0), default=-1)
        if cut >= 0:
            self.stopped, self._held, certain = True, "", pending[:cut]
        else:
            keep = _overlap(pending, self._stop)
            self._held, certain = pending[len(pending) - keep :], pending[: len(pending) - keep]
        self.text += certain
        return certain


def _overlap(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` with which a stop string begins."""
    longest = max((len(s) - 1 for s in stop), default=0)
    return next((n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in stop)), 0)
